"""A value head: a small perceptron that reads a policy's hidden state and says how good that state is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from perennial.randomness import integer_seed

HIDDEN = (512, 128)
"""Hidden widths of RLinf's head (`rlinf/models/embodiment/modules/value_head.py`)."""


def new_value_head(width: int, seed: int, hidden: Sequence[int] = HIDDEN) -> nn.Sequential:
    """Linear layers with GELU between them, [N, width] -> [N] in float32, with random weights named by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "value_head"))
        layers: list[nn.Module] = []
        for inward, outward in pairwise((width, *hidden)):
            layers += [nn.Linear(inward, outward), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear((width, *hidden)[-1], 1), nn.Flatten(0))
