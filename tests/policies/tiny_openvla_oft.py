"""A tiny OpenVLA-OFT or OpenVLA, quick enough for every test."""

from perennial.policies._openvla.config import HALF, IMAGENET_MEAN, IMAGENET_STD, Language, Tower
from perennial.policies.openvla_oft import NormStats, OpenVLAOFT, Quantiles, small_config, train_tokenizer
from perennial.testing.policy_conformance import INSTRUCTIONS

STATE_DIM = 3
ACTION = Quantiles(q01=(-0.5, 0.0, 0.0), q99=(0.5, 2.0, 0.7), mask=(True, True, False))
PROPRIO = Quantiles(q01=(-1.0,) * STATE_DIM, q99=(1.0,) * STATE_DIM)


def tiny_policy(seed=0, kind=OpenVLAOFT, **changes):
    tokenizer = train_tokenizer(INSTRUCTIONS)
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "dino": Tower(24, 2, 2, 48, IMAGENET_MEAN, IMAGENET_STD, registers=3),
        "siglip": Tower(32, 2, 2, 40, HALF, HALF),
        "projector_width": 48,
        "language": Language(32, 2, 4, 2, 48, initializer_range=0.2),
        "action_bins": 16,
        "hold": 3,
        "norm_stats": NormStats(ACTION, PROPRIO),
    }
    sizes |= changes
    config = small_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<s>"), **sizes)
    return kind.create(config, tokenizer, seed)
