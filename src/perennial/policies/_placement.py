"""Where a policy's weights lie and in which type, and which of its activations are computed again instead of kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perennial import discovery
from perennial.errors import PerennialError
from perennial.policies.base import Policy

DType = Literal["float32", "bfloat16"]


def check_placement(device: str, dtype: DType | None, option: str = "--policy.") -> None:
    """See that this machine has the device and that the device computes in the type.

    Args:
        device: as torch names it.
        dtype: of the weights.
        option: how the options begin that chose them.

    Raises:
        PerennialError: it does not.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise PerennialError(f"{option}device is {device!r}, but it must be cpu, cuda or cuda:<number>.")
    if kind == "cpu":
        return
    if not torch.cuda.is_available():
        raise PerennialError(
            f"{option}device is {device!r}, but torch {torch.__version__} finds no GPU here; see `perennial doctor`, "
            f"or set {option}device cpu."
        )
    if dtype == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
        raise PerennialError(
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16, and learning in float16 would "
            f"overflow; set {option}dtype float32, or take a GPU of compute capability 8.0 or newer."
        )


def load_policy(name: str, checkpoint: Path, device: str = "cpu", dtype: DType | None = None) -> Policy:
    """The base policy of class `name`, ready to act.

    Args:
        name: as in `perennial list policies`.
        checkpoint: folder of the base checkpoint.
        device: where the weights go.
        dtype: of the weights; None takes what the checkpoint asks for.

    Raises:
        PerennialError: this machine lacks the device, or the checkpoint does not fit.
    """
    check_placement(device, dtype)
    kind = discovery.find("policies", name, Policy)
    policy = kind.load(checkpoint, getattr(torch, dtype) if dtype else None, device)
    if next(policy.model.parameters()).dtype == torch.bfloat16:  # which the checkpoint may have asked for
        check_placement(device, "bfloat16")
    return policy


def recompute_blocks(policy: Policy) -> None:
    """Gradient checkpointing (Chen et al., arXiv 1604.06174): keep only what goes into each of `policy.blocks()`.

    The backward pass runs a block again for what lies between. Losses and gradients stay the same, bit for bit on one
    device; the update takes a third more arithmetic. Acting, which keeps no activations, is not touched.
    """
    for block in policy.blocks():
        block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    # The networks draw no random numbers: adapters are without dropout, and policies stay in evaluation mode.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def module_lists(model: nn.Module) -> tuple[nn.Module, ...]:
    """The members of all module lists in `model`: what transformers' networks stack their blocks in."""
    return tuple(block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module)
