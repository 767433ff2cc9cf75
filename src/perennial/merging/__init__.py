"""Merging: pure functions on state dicts, and the same arithmetic streamed over checkpoints and LoRA adapters.

One module a method: `linear`, `task_arithmetic`, `slerp`, `ties`, `dare`, `fisher`, `ema`. `checkpoints` merges
safetensors checkpoints of any size on disk, `adapters` merges PEFT LoRA folders on the products of their factors.
"""
