"""What all merge methods agree on: same names, same shapes, and tensors that nobody changed stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from perennial.errors import PerennialError

StateDict = Mapping[str, Tensor]

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LISTED = 10

BLOCK = 1 << 20
"""Elements of a tensor that are merged at a time when streaming; a few megabytes, which stay in the cache."""


def require_same_tensors(
    base: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], label: str = "fine-tuned model"
) -> None:
    """Check that two models have the same tensors, given as name -> shape.

    Raises:
        PerennialError: names or shapes differ; the first ten differences are listed.
    """
    differences = [f"{name} is missing" for name in base if name not in other]
    differences += [f"{name} is not in the base" for name in other if name not in base]
    differences += [
        f"{name} is {list(other[name])} instead of {list(shape)}"
        for name, shape in base.items()
        if name in other and tuple(other[name]) != tuple(shape)
    ]
    if differences:
        listed = ", ".join(differences[:LISTED]) + (", ..." if len(differences) > LISTED else "")
        raise PerennialError(
            f"The {label} does not fit the base, {len(differences)} tensors differ: {listed}. "
            "Merge only models of one architecture."
        )


def require_fraction(value: float, name: str, extrapolate: bool = False) -> None:
    """Check that a coefficient is in [0, 1], or merely finite when `extrapolate`.

    Raises:
        PerennialError: it is not.
    """
    if not math.isfinite(value):
        raise PerennialError(f"{name} is {value}, but it must be a finite number.")
    if not extrapolate and not 0 <= value <= 1:
        raise PerennialError(f"{name} is {value}, but it must lie in [0, 1]; beyond it goes only with --extrapolate.")


def shapes(state: StateDict) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def require_aligned(base: StateDict, finetuned: Sequence[StateDict]) -> None:
    """Check that every fine-tuned state dict has the names and shapes of the base.

    Raises:
        PerennialError: one has not.
    """
    for number, other in enumerate(finetuned, 1):
        label = "fine-tuned model" if len(finetuned) == 1 else f"fine-tuned model {number}"
        require_same_tensors(shapes(base), shapes(other), label)


def unchanged(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors hold the same values; most of those that differ already differ at the start."""
    base, *others = (tensor.flatten() for tensor in tensors)
    return all(
        other.dtype == base.dtype and torch.equal(other[:1024], base[:1024]) and torch.equal(other, base)
        for other in others
    )


def refuse_quantised(name: str, dtype: object) -> PerennialError:
    """The error for a tensor whose numbers cannot be averaged."""
    return PerennialError(
        f"{name} is of type {dtype} and differs between the models, but only floating-point weights can be merged; "
        "store quantised weights as bfloat16 first."
    )


def merge_each(
    base: StateDict, finetuned: Sequence[StateDict], merge: Callable[[str, Tensor, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Apply `merge(name, base tensor, fine-tuned tensors)` to every tensor that changed.

    A tensor that is the same in all models is copied bit for bit, whatever its values (a mask of -inf, a frozen
    parameter). A single number that is no floating-point number, such as a step counter, comes from the base.

    Raises:
        PerennialError: names or shapes differ, or a tensor of integers differs between the models.
    """
    require_aligned(base, finetuned)
    merged = {}
    for name, tensor in base.items():
        others = [other[name] for other in finetuned]
        if unchanged([tensor, *others]) or (tensor.dtype not in MERGEABLE and tensor.dim() == 0):
            merged[name] = tensor.clone()
        elif tensor.dtype not in MERGEABLE:
            raise refuse_quantised(name, tensor.dtype)
        else:
            merged[name] = merge(name, tensor, others)
    return merged


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 for float64 weights."""
    return torch.promote_types(tensor.dtype, torch.float32)
