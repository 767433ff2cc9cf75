"""Spherical linear interpolation of weights, tensor by tensor (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perennial.merging.linear import interpolate
from perennial.merging.state_dicts import StateDict, accumulator, merge_each, require_fraction

PARALLEL = 1e-6
"""Below this sine of the angle the great circle is a straight line to double precision, or undefined."""


def inner_products(base: Tensor, finetuned: Tensor) -> Tensor:
    """<base, base>, <base, finetuned>, <finetuned, finetuned> in float64, shape [3]; they add up over blocks."""
    left, right = base.flatten().double(), finetuned.flatten().double()
    return torch.stack([left @ left, left @ right, right @ right])


def slerp_tensor(base: Tensor, finetuned: Tensor, alpha: float, products: Tensor) -> Tensor:
    """sin((1-alpha) w)/sin(w) * base + sin(alpha w)/sin(w) * finetuned, where w is the angle between both.

    Args:
        base: any shape; decides the type of the result. May be a block of the tensor that `products` belong to.
        finetuned: same shape.
        alpha: 0 gives `base`, 1 gives `finetuned`, bit for bit.
        products: of `inner_products` of the whole tensors. If the tensors are parallel, opposite or zero, the
            interpolation is linear.
    """
    squared_base, inner, squared_finetuned = products.tolist()
    norms = math.sqrt(squared_base * squared_finetuned)
    angle = math.acos(max(-1.0, min(1.0, inner / norms))) if norms > 0 else 0.0
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
    return merge_each(
        base,
        [finetuned],
        lambda _, tensor, others: slerp_tensor(tensor, others[0], alpha, inner_products(tensor, others[0])),
    )
