"""Pure functions on weights, gradients' squares and logits; nothing here loads or plays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightUpdate:
    """How large an update is and how many directions it takes.

    Attributes:
        frobenius: norm of all its numbers together.
        relative: `frobenius` by the same norm of the base.
        matrices: how many matrices changed; the figures below are over these, None where none did.
        nuclear, nuclear_std: mean and standard deviation of the sum of singular values.
        rank, rank_std: mean and standard deviation of the effective rank.
    """

    frobenius: float
    relative: float
    matrices: int
    nuclear: float | None
    nuclear_std: float | None
    rank: float | None
    rank_std: float | None


@dataclass(frozen=True)
class FisherEnergy:
    """How much an update d moves what the policy does, by the diagonal F of its Fisher information.

    Attributes:
        energy: sum F_i d_i^2. Half of it is the second-order estimate of KL(base || learned) per decision, in nats,
            if F had no entries beside the diagonal.
        share: sum F_i d_i^2 / (max F * sum d_i^2), in [0, 1], the normalised form of arXiv 2603.11653; None where
            nothing moved or nothing matters.
        ratio: sum F_i d_i^2 / (mean F * sum d_i^2); 1 is a random direction, less avoids what matters.
    """

    energy: float
    share: float | None
    ratio: float | None


def singular_values(base: Tensor, learned: Tensor) -> Tensor:
    """Singular values of `learned` - `base`, float64, the largest first, without those that rounding explains.

    Storing `learned` moves every number by up to eps / 2 of itself, which no singular value can exceed by more than
    eps / 2 * ||learned||_F (Weyl); twice that is left out, or an update of low rank would appear to have full rank.

    Args:
        base: [rows, ...]; all dimensions but the first count as columns.
        learned: of the same shape.
    """
    values: Tensor = torch.linalg.svdvals((learned.double() - base.double()).flatten(1))
    floor = torch.finfo(learned.dtype).eps * learned.double().norm()
    return values[values > floor]


def effective_rank(singular: Tensor) -> float:
    """The exponential of the entropy of the singular values scaled to sum 1 (Roy and Vetterli, EUSIPCO 2007).

    k equal values give k; no value gives 0.
    """
    if not len(singular):
        return 0.0
    share = singular.double() / singular.double().sum()
    return float(torch.special.entr(share).sum().exp())


def spectra(base: Weights, learned: Weights) -> dict[str, Tensor]:
    """`singular_values` of every matrix that changed and has more than one row and column, by parameter name."""
    matrices = [name for name, weight in learned.items() if weight.ndim > 1 and min(weight.flatten(1).shape) > 1]
    found = {name: singular_values(base[name], learned[name]) for name in matrices}
    return {name: values for name, values in found.items() if len(values)}


def weight_update(base: Weights, learned: Weights, changed: Weights, names: Iterable[str]) -> WeightUpdate:
    """The update of the parameters `names`, with `changed` from `spectra`."""
    chosen = list(names)
    frobenius = math.sqrt(sum(float((learned[n].double() - base[n].double()).square().sum()) for n in chosen))
    size = math.sqrt(sum(float(base[n].double().square().sum()) for n in chosen))
    matrices = [changed[n] for n in chosen if n in changed]
    nuclear = _spread([float(values.sum()) for values in matrices])
    rank = _spread([effective_rank(values) for values in matrices])
    return WeightUpdate(frobenius, frobenius / size if size else 0.0, len(matrices), *nuclear, *rank)


def fisher_energy(fisher: Weights, base: Weights, learned: Weights, names: Iterable[str]) -> FisherEnergy:
    """The energy of the update of the parameters `names`; mean and maximum of `fisher` are over these too."""
    energy, moved, total, largest, count = 0.0, 0.0, 0.0, 0.0, 0
    for name in names:
        information, squared = fisher[name].double(), (learned[name].double() - base[name].double()).square()
        energy += float((information * squared).sum())
        moved += float(squared.sum())
        total += float(information.sum())
        largest = max(largest, float(information.max()))
        count += information.numel()
    if not moved or not total:
        return FisherEnergy(energy, None, None)
    return FisherEnergy(energy, energy / (largest * moved), energy * count / (total * moved))


def divergence(first: Tensor, second: Tensor, mask: Tensor, temperature: float) -> float:
    """Mean over unmasked tokens of KL(first || second), in nats.

    Args:
        first: logits [N, K, bins].
        second: logits of the same shape.
        mask: bool [N, K], True where the token counts.
        temperature: of both distributions, above 0.
    """
    log_first, log_second = ((logits.double() / temperature).log_softmax(-1) for logits in (first, second))
    tokens = (log_first.exp() * (log_first - log_second)).sum(-1)
    return float((tokens * mask).sum() / mask.sum().clamp(min=1))


def _spread(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and population standard deviation."""
    if not values:
        return None, None
    together = torch.tensor(values, dtype=torch.float64)
    return float(together.mean()), float(together.std(correction=0))
