"""A tiny pi-0, quick enough for every test."""

from tokenizers.normalizers import Lowercase

from perennial.policies._pi0.config import Transformer, Vision
from perennial.policies._tokenizer import BOS, train_tokenizer
from perennial.policies.pi0 import PI0, Moments, small_config
from perennial.testing.policy_conformance import INSTRUCTIONS

STATE_DIM = 3
ACTION = Moments(mean=(0.1, -0.2, 0.0), std=(0.5, 2.0, 1.0))
STATE = Moments(mean=(0.0, 0.5, -0.5), std=(1.0, 0.5, 2.0))


def tiny_tokenizer():
    tokenizer = train_tokenizer(INSTRUCTIONS)
    tokenizer.normalizer = Lowercase()
    return tokenizer


def tiny_sizes(patch_size, layers, heads, key_value_heads):
    of_both = {"layers": layers, "heads": heads, "key_value_heads": key_value_heads}
    decoders = {**of_both, "head_dim": 8, "initializer_range": 0.3}
    return {
        "image_size": 16,
        "vision": Vision(width=16, layers=2, heads=2, mlp_width=24, patch_size=patch_size),
        "language": Transformer(width=24, mlp_width=32, **decoders),
        "expert": Transformer(width=20, mlp_width=32, **decoders),
        "horizon": 4,
        "executed": 3,
        "max_state_dim": 5,
        "max_action_dim": 4,
        "denoising_steps": 4,
    }


def tiny_policy(seed=0, **changes):
    tokenizer = tiny_tokenizer()
    sizes = tiny_sizes(patch_size=8, layers=2, heads=2, key_value_heads=1) | changes
    config = small_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(BOS), STATE, ACTION, **sizes)
    return PI0.create(config, tokenizer, seed)
