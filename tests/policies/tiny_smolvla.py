"""A tiny SmolVLA, quick enough for every test."""

from tiny_pi0 import ACTION, STATE, STATE_DIM, tiny_sizes, tiny_tokenizer

from perennial.policies.smolvla import SmolVLA, small_config

__all__ = ["ACTION", "STATE", "STATE_DIM", "tiny_policy"]


def tiny_policy(seed=0, **changes):
    tokenizer = tiny_tokenizer()
    sizes = tiny_sizes(patch_size=4, layers=4, heads=4, key_value_heads=2) | changes
    config = small_config(tokenizer.get_vocab_size(), STATE, ACTION, **sizes)
    return SmolVLA.create(config, tokenizer, seed)
