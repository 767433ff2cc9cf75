"""Which parameters see, which understand and which act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

Group = Literal["vision", "language", "action"]
GROUPS: tuple[str, ...] = get_args(Group)
"""The groups of every policy's parameters, in the order in which the gradient leaves them."""


def by_prefix(network: nn.Module, group_of: Mapping[str, str]) -> dict[str, list[str]]:
    """The parameter names of each group, in order.

    Args:
        network: whose parameters are grouped.
        group_of: beginning of a name -> group; the first that fits counts.
    """
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, _ in network.named_parameters():
        prefix = next(prefix for prefix in group_of if name.startswith(prefix))
        groups[group_of[prefix]].append(name)
    return groups
