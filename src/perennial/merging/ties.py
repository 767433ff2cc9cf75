"""TIES merging (Yadav et al., arXiv 2306.01708): trim, elect sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.state_dicts import (
    MERGEABLE,
    StateDict,
    accumulator,
    merge_each,
    require_aligned,
    require_fraction,
)

HALF = 1 << 16


def trim_threshold(task_vector: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude from which on an entry belongs to the largest `density` of a task vector.

    Two passes over histograms of the float32 bits (which order like the magnitudes) find the exact value without ever
    holding the task vector in memory.

    Args:
        task_vector: gives the pieces of the task vector, of any shapes, each time it is called.
        density: fraction that is kept, in (0, 1]; at least one entry is.
    """
    size, upper = 0, torch.zeros(HALF, dtype=torch.int64)
    for piece in task_vector():
        size += piece.numel()
        upper += torch.bincount(_bits(piece) >> 16, minlength=HALF)
    if size == 0:
        return 0.0
    bucket, above = _locate(upper, max(1, round(density * size)))
    lower = torch.zeros(HALF, dtype=torch.int64)
    for piece in task_vector():
        bits = _bits(piece)
        lower += torch.bincount(bits[bits >> 16 == bucket] & (HALF - 1), minlength=HALF)
    last, _ = _locate(lower, above)
    return torch.tensor((bucket << 16) + last, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: Tensor) -> Tensor:
    return piece.flatten().float().abs().view(torch.int32)


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest entry, and that entry's rank within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    before = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, rank - before


def elect_and_average(base: Tensor, finetuned: Sequence[Tensor], thresholds: Sequence[float], alpha: float) -> Tensor:
    """The base plus alpha times the mean of those trimmed task entries whose sign is that of their sum, elementwise.

    Args:
        base: any shape; decides the type of the result.
        finetuned: same shape.
        thresholds: of `trim_threshold`, one for each; smaller entries count as zero.
        alpha: lambda of the paper.
    """
    origin = base.to(accumulator(base))
    trimmed = []
    for tensor, threshold in zip(finetuned, thresholds, strict=True):
        delta = tensor.to(origin.dtype) - origin
        trimmed.append(delta.masked_fill_(delta.float().abs() < threshold, 0))
    entries = torch.stack(trimmed)
    agrees = (entries.sign() == entries.sum(0).sign()) & (entries != 0)
    mean = entries.mul_(agrees).sum(0).div_(agrees.sum(0).clamp_(min=1))
    return torch.add(origin, mean, alpha=alpha).to(base.dtype)


def ties(
    base: StateDict, finetuned: Sequence[StateDict], alpha: float = 1.0, *, density: float = 0.2
) -> dict[str, Tensor]:
    """`theta = theta_base + alpha * tau`, where tau is made of the task vectors tau_i = theta_i - theta_base.

    1. Trim: in each tau_i keep the largest `density` of all entries by magnitude, over the whole model.
    2. Elect: the sign of each parameter is that of the sum of the trimmed entries; if they cancel, it stays at base.
    3. Merge: tau is the mean of the non-zero entries of that sign.

    Args:
        base: the model that all were fine-tuned from; decides the types of the result.
        finetuned: at least one.
        alpha: lambda of the paper, any finite number, 1 where nothing can be validated.
        density: fraction kept in (0, 1]; the paper keeps 20 %.

    Raises:
        PerennialError: names or shapes differ, or a coefficient is out of range.
    """
    require_ties(len(finetuned), density)
    require_fraction(alpha, "alpha", extrapolate=True)

    def deltas(other: StateDict) -> Iterable[Tensor]:
        changing = (name for name, tensor in base.items() if tensor.dtype in MERGEABLE)
        return (other[name].to(accumulator(base[name])) - base[name].to(accumulator(base[name])) for name in changing)

    require_aligned(base, finetuned)
    thresholds = [trim_threshold(lambda other=other: deltas(other), density) for other in finetuned]  # type: ignore[misc]
    return merge_each(base, finetuned, lambda _, tensor, others: elect_and_average(tensor, others, thresholds, alpha))


def require_ties(models: int, density: float) -> None:
    """Check the number of fine-tuned models and the density.

    Raises:
        PerennialError: there is no model, or the density is outside (0, 1].
    """
    if not models:
        raise PerennialError("TIES needs at least one fine-tuned model.")
    if not 0 < density <= 1:
        raise PerennialError(f"The TIES density is {density}, but it must lie in (0, 1].")
