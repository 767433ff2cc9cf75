"""Spherical linear interpolation of weights, tensor by tensor (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from perennial.merging.linear import interpolate
from perennial.merging.state_dicts import StateDict, accumulator, merge_each, require_fraction

PARALLEL = 1e-6
"""Below this sine of the angle the great circle is a straight line to double precision, or undefined."""


def angle_between(blocks: Iterable[Sequence[Tensor]]) -> float:
    """The angle between two tensors, given as pairs of blocks, in radians; 0 if one of them is zero."""
    base = mixed = finetuned = 0.0
    for block in blocks:
        left, right = (tensor.flatten().double() for tensor in block)
        base += (left @ left).item()
        mixed += (left @ right).item()
        finetuned += (right @ right).item()
    norms = math.sqrt(base * finetuned)
    return math.acos(max(-1.0, min(1.0, mixed / norms))) if norms > 0 else 0.0


def slerp_tensor(base: Tensor, finetuned: Tensor, alpha: float, angle: float) -> Tensor:
    """`(sin((1 - alpha) * angle) * base + sin(alpha * angle) * finetuned) / sin(angle)`, elementwise.

    Args:
        base: any shape; decides the type of the result. May be a block of a larger tensor.
        finetuned: same shape.
        alpha: 0 gives `base`, 1 gives `finetuned`, bit for bit.
        angle: between the whole tensors, in radians; at 0 and pi the interpolation is linear.
    """
    if alpha in (0, 1) or math.sin(angle) < PARALLEL:
        return interpolate(base, finetuned, alpha)
    start, end = math.sin((1 - alpha) * angle) / math.sin(angle), math.sin(alpha * angle) / math.sin(angle)
    origin = base.to(accumulator(base))
    return origin.mul(start).add_(finetuned.to(origin.dtype), alpha=end).to(base.dtype)


def slerp(base: StateDict, finetuned: StateDict, alpha: float, *, extrapolate: bool = False) -> dict[str, Tensor]:
    """Walk along the great circle from each base tensor to its fine-tuned one; of equal norms, the norm stays.

    Args:
        base: the pretrained model; decides the types of the result.
        finetuned: a model fine-tuned from it.
        alpha: fraction of the way in [0, 1].
        extrapolate: allow any finite alpha.

    Raises:
        PerennialError: names or shapes differ, or alpha is out of range.
    """
    require_fraction(alpha, "alpha", extrapolate)

    def merge(_: str, tensor: Tensor, others: list[Tensor]) -> Tensor:
        return slerp_tensor(tensor, others[0], alpha, angle_between([(tensor, others[0])]))

    return merge_each(base, [finetuned], merge)
