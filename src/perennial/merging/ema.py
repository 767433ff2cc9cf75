"""Exponential moving average of weights (Polyak & Juditsky 1992 in its exponential form)."""

from __future__ import annotations

from torch import Tensor

from perennial.merging.linear import linear
from perennial.merging.state_dicts import StateDict, require_fraction


def ema(average: StateDict, current: StateDict, decay: float) -> dict[str, Tensor]:
    """`average' = decay * average + (1 - decay) * current`.

    Args:
        average: the average so far; keep it in float32, in bfloat16 the steps of a decay near 1 round to nothing.
        current: the weights of this step.
        decay: in [0, 1]; 1 keeps the average, 0 replaces it, both bit for bit.

    Raises:
        PerennialError: names or shapes differ, or the decay is out of range.
    """
    require_fraction(decay, "decay")
    return linear(average, current, 1 - decay)
