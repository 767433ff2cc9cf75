"""Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.linear import running_mean
from perennial.merging.state_dicts import StateDict, accumulator, merge_each, require_same_tensors, shapes


def fisher_average(
    models: Sequence[StateDict], fishers: Sequence[StateDict], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """`theta = sum_i w_i F_i theta_i / sum_i w_i F_i, elementwise` with diagonal Fishers F_i.

    Where no model has any information (all F_i are zero) it is the average weighted by w_i.

    Args:
        models: at least one; the first decides the types of the result.
        fishers: diagonal Fisher information of each model, same names and shapes, not negative.
        weights: w_i, not negative, not all zero; equal by default.

    Raises:
        PerennialError: names or shapes differ, the weights do not fit, or a Fisher value is negative or no number.
    """
    weights = [1.0] * len(models) if weights is None else weights
    if not models or not len(models) == len(fishers) == len(weights) or min(weights) < 0 or sum(weights) == 0:
        raise PerennialError(f"{len(models)} models, {len(fishers)} Fishers and weights {list(weights)} do not fit.")
    for number, fisher in enumerate(fishers, 1):
        require_same_tensors(shapes(models[0]), shapes(fisher), f"Fisher information of model {number}")
        for name, values in fisher.items():
            if not bool((values >= 0).all()):
                raise PerennialError(f"The Fisher information of model {number} is negative or NaN in {name}.")

    def mean(name: str, first: Tensor, others: list[Tensor]) -> Tensor:
        scaled = [fisher[name].to(accumulator(first)) * weight for fisher, weight in zip(fishers, weights, strict=True)]
        nothing = torch.stack(scaled).sum(0) == 0
        importance = [values.masked_fill(nothing, weight) for values, weight in zip(scaled, weights, strict=True)]
        return running_mean([first, *others], importance)

    return merge_each(models[0], models[1:], mean)
