"""DARE (Yu et al., arXiv 2311.03099): drop most of what a fine-tuning changed at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.state_dicts import BLOCK, StateDict, accumulator, merge_each, require_fraction
from perennial.randomness import stream


def keep_mask(seed: int, name: str, model: int, block: int, size: int, drop: float) -> Tensor:
    """Which of the `size` entries of a block stay, bool [size].

    Every block of every tensor has its own random stream, so a mask depends neither on the order of the tensors nor
    on whether they come from memory or from a file.
    """
    draws = stream(seed, "dare", name, model, block).random(size, dtype=np.float32)
    return torch.from_numpy(draws >= drop)


def drop_and_rescale(
    base: Tensor, finetuned: Sequence[Tensor], masks: Sequence[Tensor], drop: float, alpha: float
) -> Tensor:
    """`base + alpha * sum_i mask_i * (finetuned_i - base) / (1 - drop)`, elementwise.

    Args:
        base: any shape; decides the type of the result.
        finetuned: same shape.
        masks: bool, same shape, one for each of `finetuned`.
        drop: probability p with which the masks drop, in [0, 1).
        alpha: coefficient of the task vectors.
    """
    origin = base.to(accumulator(base))
    total = origin.clone()
    for tensor, mask in zip(finetuned, masks, strict=True):
        total.add_((tensor.to(origin.dtype) - origin).mul_(mask), alpha=alpha / (1 - drop))
    return total.to(base.dtype)


def dare(
    base: StateDict, finetuned: Sequence[StateDict], alpha: float = 1.0, *, drop: float = 0.9, seed: int = 0
) -> dict[str, Tensor]:
    """`theta = theta_base + alpha * sum_i m_i * tau_i / (1 - p)`, m_i ~ Bernoulli(1 - p), tau_i = theta_i - theta_base.

    The expectation over the masks is task arithmetic with coefficient alpha.

    Args:
        base: the model that all were fine-tuned from; decides the types of the result.
        finetuned: at least one.
        alpha: any finite number.
        drop: p in [0, 1); the paper drops 90 % and more.
        seed: names the masks; each tensor has its own stream.

    Raises:
        PerennialError: names or shapes differ, or a coefficient is out of range.
    """
    require_dare(len(finetuned), drop)
    require_fraction(alpha, "alpha", extrapolate=True)

    def merge(name: str, tensor: Tensor, others: list[Tensor]) -> Tensor:
        sizes = [min(BLOCK, tensor.numel() - start) for start in range(0, tensor.numel(), BLOCK)]
        masks = [
            torch.cat([keep_mask(seed, name, model, block, size, drop) for block, size in enumerate(sizes)])
            for model in range(len(others))
        ]
        return drop_and_rescale(tensor, others, [mask.view(tensor.shape) for mask in masks], drop, alpha)

    return merge_each(base, finetuned, merge)


def require_dare(models: int, drop: float) -> None:
    """Check the number of fine-tuned models and the drop rate.

    Raises:
        PerennialError: there is no model, or the drop rate is outside [0, 1).
    """
    if not models:
        raise PerennialError("DARE needs at least one fine-tuned model.")
    if not 0 <= drop < 1:
        raise PerennialError(f"The DARE drop rate is {drop}, but it must lie in [0, 1).")
