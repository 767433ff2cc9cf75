"""Task arithmetic (Ilharco et al., arXiv 2212.04089): add what several fine-tunings changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.linear import interpolate
from perennial.merging.state_dicts import StateDict, accumulator, merge_each, require_fraction


def add_task_vectors(base: Tensor, finetuned: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """`base + sum_i coefficient_i * (finetuned_i - base)`, elementwise, in the type of `base`; all of one shape."""
    if len(finetuned) == 1:
        return interpolate(base, finetuned[0], coefficients[0])
    origin = base.to(accumulator(base))
    total = origin.clone()
    for tensor, coefficient in zip(finetuned, coefficients, strict=True):
        total.add_(tensor.to(origin.dtype) - origin, alpha=coefficient)
    return total.to(base.dtype)


def task_arithmetic(
    base: StateDict, finetuned: Sequence[StateDict], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """`theta = theta_base + sum_i lambda_i * tau_i` with the task vectors tau_i = theta_i - theta_base.

    Args:
        base: the model that all were fine-tuned from; decides the types of the result.
        finetuned: at least one.
        coefficients: lambda_i, one for each, any finite number; a negative one unlearns.

    Raises:
        PerennialError: names or shapes differ, or the coefficients do not fit.
    """
    if not finetuned or len(coefficients) != len(finetuned):
        raise PerennialError(f"{len(finetuned)} fine-tuned models cannot have the coefficients {list(coefficients)}.")
    for coefficient in coefficients:
        require_fraction(coefficient, "a task coefficient", extrapolate=True)
    return merge_each(base, finetuned, lambda _, tensor, others: add_task_vectors(tensor, others, coefficients))
