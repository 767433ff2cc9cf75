"""What a run has learned, on disk: a PEFT adapter, or all weights where there is none, and the value head beside it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from perennial.policies._tensors import read_tensors, write_tensors
from perennial.policies.base import Policy
from perennial.policies.lora import is_wrapped, load_adapter, save_adapter

WEIGHTS = "model.safetensors"
VALUE_HEAD = "value_head.safetensors"


def save_learned(policy: Policy, folder: Path, base: str) -> None:
    """Write `folder`/adapter, a standard PEFT folder, or `folder`/model.safetensors; and value_head.safetensors.

    Args:
        policy: what has learned.
        folder: an existing folder.
        base: name of the base checkpoint, for people.
    """
    if is_wrapped(policy.model):
        save_adapter(policy, folder / "adapter", base)
    else:
        write_tensors(folder / WEIGHTS, policy.acting_weights())
    if policy.value_head is not None:
        write_tensors(folder / VALUE_HEAD, policy.value_head.state_dict())


def load_learned(policy: Policy, folder: Path) -> None:
    """Read what `save_learned` wrote into a policy that was prepared in the same way.

    A value head is only read into a policy that has one; acting needs none.

    Raises:
        PerennialError: the files are damaged or belong to another base.
    """
    if is_wrapped(policy.model):
        load_adapter(policy, folder / "adapter")
    else:
        read_tensors(folder / WEIGHTS, policy.model)
    if policy.value_head is not None:
        read_tensors(folder / VALUE_HEAD, policy.value_head)


def learned_weights(policy: Policy) -> dict[str, Tensor]:
    """Detached copies of the parameters that `save_learned` writes, by name: the adapter's, or all of them."""
    adapter = is_wrapped(policy.model)
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if not adapter or ".lora_" in n}


def read_learned_weights(policy: Policy, folder: Path) -> dict[str, Tensor]:
    """The parameters that `save_learned` wrote for a policy prepared in the same way; `policy` stays as it is."""
    adapter = is_wrapped(policy.model)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors" if adapter else folder / WEIGHTS)
    names = [name for name, _ in policy.model.named_parameters() if not adapter or ".lora_" in name]
    return {name: stored[name.replace(".default.", ".")].to(policy.device) for name in names}
