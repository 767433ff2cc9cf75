"""Copies of what learns, looking through them for a moment, going part of the way, and naming them in a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from perennial.merging.groups import Coefficients, by_name
from perennial.policies.base import Policy
from perennial.policies.lora import base_name

ROUNDING = 1e-6
"""Of singular values of float32 factors, relative to the largest: what is smaller is not told from 0."""

TINY = torch.finfo(torch.float64).tiny


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


def between(old: Mapping[str, Tensor], new: Mapping[str, Tensor], weight: Callable[[str], float]) -> dict[str, Tensor]:
    """The weights that lie `weight(name)` of the way from `old` to `new`: exactly `old` at 0, exactly `new` at 1.

    Of an adapter it is the effective update B A that lies there, as near as an adapter of its rank can come. What only
    one of the two knows is left out.
    """
    found: dict[str, Tensor] = {}
    for name in [name for name in new if name in old]:
        if ".lora_A." in name:
            up = name.replace(".lora_A.", ".lora_B.")
            found[up], found[name] = average_factors((old[up], old[name]), (new[up], new[name]), weight(name))
        elif ".lora_" not in name:
            found[name] = torch.lerp(old[name].float(), new[name].float(), weight(name))
    return found


def between_groups(
    policy: Policy, old: Mapping[str, Tensor], new: Mapping[str, Tensor], coefficients: Coefficients
) -> dict[str, Tensor]:
    """`between` with a weight for each group of the policy's parameters."""
    alpha = by_name(policy.groups, coefficients)
    return between(old, new, lambda name: alpha[base_name(name)])


def average_factors(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] whose product is nearest to (1 - alpha) B_old A_old + alpha B_new A_new.

    Nearest in the Frobenius norm, by the singular values of the small core between two QR decompositions. Of all
    factors with this product it gives those that lie by the averages of the given ones, which need not have it: what
    was measured or anchored entry by entry stays valid, and factors change as little as `alpha` does. A is the average
    where that spans the rows of the product, and is otherwise turned into them; no direction of it shrinks below half.
    """
    (b_old, a_old), (b_new, a_new) = old, new
    if alpha in (0, 1):
        return new if alpha else old
    b, core_b = torch.linalg.qr(torch.cat([(1 - alpha) * b_old, alpha * b_new], dim=1).double())
    a, core_a = torch.linalg.qr(torch.cat([a_old, a_new]).double().T)
    core, up = core_b @ core_a.T, torch.lerp(b_old.double(), b_new.double(), alpha)
    down = torch.lerp(a_old.double(), a_new.double(), alpha) @ a
    # The rows of the product are those of its largest singular values; where it has none, those of the average.
    full = (core_b.norm() * core_a.norm()).clamp(min=TINY)
    faint = ROUNDING * down / down.norm().clamp(min=TINY)
    rows = torch.linalg.svd(torch.cat([core / full, faint]), full_matrices=False)[2][: len(a_new)]
    left, sizes, right = torch.linalg.svd(down @ rows.T, full_matrices=False)
    least = torch.linalg.svdvals(down)[: len(sizes)] / 2
    sizes = sizes.maximum(least).clamp(min=max(ROUNDING * float(core_a.norm()), TINY))
    rows = right @ rows
    empty = up - up @ left @ left.T  # columns of B that meet only zeros
    return (b @ core @ (rows.T / sizes) @ left.T + empty).to(b_new), (left * sizes @ rows @ a.T).to(a_new)


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
