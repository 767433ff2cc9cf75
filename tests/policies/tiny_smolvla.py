"""A tiny SmolVLA, quick enough for every test."""

from tiny_pi0 import ACTION, STATE, STATE_DIM
from tokenizers.normalizers import Lowercase

from perennial.policies._pi0_config import Transformer, Vision
from perennial.policies._tokenizer import train_tokenizer
from perennial.policies.smolvla import SmolVLA, small_config
from perennial.testing.policy_conformance import INSTRUCTIONS

__all__ = ["ACTION", "STATE", "STATE_DIM", "tiny_policy"]


def tiny_policy(seed=0, **changes):
    tokenizer = train_tokenizer(INSTRUCTIONS)
    tokenizer.normalizer = Lowercase()
    heads = {"layers": 4, "heads": 4, "key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    sizes = {
        "image_size": 16,
        "vision": Vision(width=16, layers=2, heads=2, mlp_width=24, patch_size=4),
        "language": Transformer(width=24, mlp_width=32, **heads),
        "expert": Transformer(width=20, mlp_width=32, **heads),
        "horizon": 4,
        "executed": 3,
        "max_state_dim": 5,
        "max_action_dim": 4,
        "denoising_steps": 4,
    }
    config = small_config(tokenizer.get_vocab_size(), STATE, ACTION, **(sizes | changes))
    return SmolVLA.create(config, tokenizer, seed)
