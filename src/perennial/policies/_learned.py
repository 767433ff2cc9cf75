"""What a run has learned, on disk: a PEFT adapter, or all weights where there is no adapter."""

from __future__ import annotations

from pathlib import Path

from perennial.policies._tensors import read_tensors, write_tensors
from perennial.policies.base import Policy
from perennial.policies.lora import is_wrapped, load_adapter, save_adapter

WEIGHTS = "model.safetensors"


def save_learned(policy: Policy, folder: Path, base: str) -> None:
    """Write `folder`/adapter, a standard PEFT folder, or `folder`/model.safetensors.

    Args:
        policy: what has learned.
        folder: an existing folder.
        base: name of the base checkpoint, for people.
    """
    if is_wrapped(policy.model):
        save_adapter(policy, folder / "adapter", base)
    else:
        write_tensors(folder / WEIGHTS, policy.acting_weights())


def load_learned(policy: Policy, folder: Path) -> None:
    """Read what `save_learned` wrote into a policy that was prepared in the same way.

    Raises:
        PerennialError: the files are damaged or belong to another base.
    """
    if is_wrapped(policy.model):
        load_adapter(policy, folder / "adapter")
    else:
        read_tensors(folder / WEIGHTS, policy.model)
