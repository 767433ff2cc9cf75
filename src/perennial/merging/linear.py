"""Linear interpolation of weights, as a whole or by parameter group (RETAIN, arXiv 2512.08333), and plain averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.state_dicts import StateDict, accumulator, merge_each, require_aligned, require_fraction


def interpolate(base: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * base + alpha * finetuned, elementwise, rounded once.

    `torch.lerp` computes half-precision inputs in float32. At alpha 0 and 1 the result is `base` and `finetuned` bit
    for bit.

    Args:
        base: any shape; decides the type of the result.
        finetuned: same shape.
        alpha: any finite number.
    """
    if alpha == 0:
        return base.clone()
    if alpha == 1:
        return finetuned.to(base.dtype, copy=True)
    if base.dtype == finetuned.dtype:
        return torch.lerp(base, finetuned, alpha)
    common = torch.promote_types(accumulator(base), accumulator(finetuned))
    return torch.lerp(base.to(common), finetuned.to(common), alpha).to(base.dtype)


def linear(base: StateDict, finetuned: StateDict, alpha: float, *, extrapolate: bool = False) -> dict[str, Tensor]:
    """`theta = (1 - alpha) * theta_base + alpha * theta_finetuned`.

    Args:
        base: the pretrained model; decides the types of the result.
        finetuned: a model fine-tuned from it.
        alpha: weight of the fine-tuned model in [0, 1].
        extrapolate: allow any finite alpha.

    Raises:
        PerennialError: names or shapes differ, or alpha is out of range.
    """
    require_fraction(alpha, "alpha", extrapolate)
    return _linear(base, finetuned, dict.fromkeys(base, alpha))


def linear_by_group(
    base: StateDict,
    finetuned: StateDict,
    alpha_by_group: Mapping[str, float],
    groups: Mapping[str, str],
    *,
    extrapolate: bool = False,
) -> dict[str, Tensor]:
    """The linear merge with a coefficient for each parameter group (RETAIN's modality-wise merging).

    Args:
        base: the pretrained model; decides the types of the result.
        finetuned: a model fine-tuned from it.
        alpha_by_group: for example {"vision": 1.0, "language": 0.8, "action": 1.0}.
        groups: tensor name -> group.
        extrapolate: allow any finite coefficient.

    Raises:
        PerennialError: as in `linear`, or a tensor has no group or its group no coefficient, or a group no tensor.
    """
    for group, alpha in alpha_by_group.items():
        require_fraction(alpha, f"alpha of {group}", extrapolate)
        if group not in groups.values():
            raise PerennialError(f"No tensor belongs to the group {group!r}; known: {sorted(set(groups.values()))}.")
    lost = [name for name in base if groups.get(name) not in alpha_by_group]
    if lost:
        raise PerennialError(f"{lost[0]} and {len(lost) - 1} other tensors have no coefficient; give every group one.")
    return _linear(base, finetuned, {name: alpha_by_group[groups[name]] for name in base})


def _linear(base: StateDict, finetuned: StateDict, alpha: Mapping[str, float]) -> dict[str, Tensor]:
    require_aligned(base, [finetuned])
    ends = {0: base, 1: finetuned}  # taken as they are, counters and all
    taken = {name: ends[int(a)][name].to(base[name].dtype, copy=True) for name, a in alpha.items() if a in ends}
    rest = [{name: tensor for name, tensor in model.items() if name not in taken} for model in (base, finetuned)]
    merged = merge_each(rest[0], rest[1:], lambda name, tensor, others: interpolate(tensor, others[0], alpha[name]))
    return {name: taken[name] if name in taken else merged[name] for name in base}


def average(models: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """sum_i w_i theta_i / sum_i w_i: a model soup (Wortsman et al., arXiv 2203.05482), uniform without `weights`.

    Args:
        models: at least one; the first decides the types of the result.
        weights: one for each model, not negative, not all zero.

    Raises:
        PerennialError: names or shapes differ, or the weights do not fit.
    """
    weights = [1.0] * len(models) if weights is None else weights
    if not models or len(weights) != len(models) or min(weights) < 0 or sum(weights) == 0:
        raise PerennialError(f"{len(models)} models cannot be averaged with the weights {list(weights)}.")

    def mean(_: str, first: Tensor, others: list[Tensor]) -> Tensor:
        return running_mean([first, *others], [torch.tensor(w, dtype=accumulator(first)) for w in weights])

    return merge_each(models[0], models[1:], mean)


def running_mean(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Weighted mean in the type of the first tensor, exact where only one weight is not zero.

    Args:
        tensors: same shape.
        weights: not negative, of the accumulator's type, scalars or of the same shape as the tensors; where all are
            zero the first tensor is returned.
    """
    mean, total = tensors[0].to(weights[0].dtype), weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + weight
        mean = torch.lerp(mean, tensor.to(mean.dtype), weight / total.clamp(min=torch.finfo(total.dtype).tiny))
    return mean.to(tensors[0].dtype)
