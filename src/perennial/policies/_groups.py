"""Which parameters see, which understand and which act."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def by_prefix(network: nn.Module, group_of: Mapping[str, str]) -> dict[str, list[str]]:
    """The parameter names of each group, in order.

    Args:
        network: whose parameters are grouped.
        group_of: beginning of a name -> "vision", "language" or "action"; the first that fits counts.
    """
    groups: dict[str, list[str]] = {"vision": [], "language": [], "action": []}
    for name, _ in network.named_parameters():
        prefix = next(prefix for prefix in group_of if name.startswith(prefix))
        groups[group_of[prefix]].append(name)
    return groups
