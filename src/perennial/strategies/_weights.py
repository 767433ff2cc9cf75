"""Copies of what learns, looking through them for a moment, and naming them in a state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from perennial.policies.base import Policy


def snapshot(policy: Policy) -> dict[str, Tensor]:
    """Detached copies of the trainable parameters: with an adapter, only the adapter."""
    return {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}


@contextmanager
def looking_through(policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `policy` compute with `weights` inside the block.

    Only the storage is exchanged: parameters keep their identity, gradients and optimiser state, and a graph that was
    recorded before the block is still valid after it.
    """
    parameters = dict(policy.model.named_parameters())
    own = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


@torch.no_grad()
def restore(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of those names."""
    parameters = dict(policy.model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, named `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, state: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """The tensors that `prefixed` named, on `device` where given."""
    start = f"{prefix}/"
    return {key.removeprefix(start): value.to(device) for key, value in state.items() if key.startswith(start)}


def nested(state: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, dict[str, Tensor]]:
    """Tensors named `outer/inner`, grouped by `outer` (which may itself hold slashes) in order of appearance."""
    outer = dict.fromkeys(key.rpartition("/")[0] for key in state)
    return {name: unprefixed(name, state, device) for name in outer}
