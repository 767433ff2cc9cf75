"""Which part of a policy a tensor belongs to, told by its name, and the coefficient that follows from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from perennial.errors import unknown
from perennial.merging.state_dicts import require_fraction
from perennial.policies._groups import GROUPS

Coefficients = tuple[float, float, float]
"""Weight of the fine-tuned weights in each of `GROUPS`."""

OTHER = "other"
"""The group of tensors that no prefix matches."""

DEFAULT_GROUPS: Mapping[str, str] = {
    # PaliGemma's own word head emits no action, every other head does.
    "paligemma.lm_head": "language",
    "lm_head": "action",
    "action": "action",
    "embed_action": "action",
    "gemma_expert": "action",
    "lm_expert": "action",
    "dit.": "action",
    "state_proj": "action",
    "time_mlp": "action",
    "proprio": "action",
    "value_head": "action",
    "vision": "vision",
    "image": "vision",
    "projector": "vision",
    "multi_modal_projector": "vision",
    "connector": "vision",
    "language": "language",
    "text": "language",
    "embed_tokens": "language",
}
"""Prefix -> group for OpenVLA, OpenVLA-OFT, pi0 and SmolVLA names; the first that matches counts."""


def group_of(name: str, groups: Mapping[str, str] = DEFAULT_GROUPS) -> str:
    """The group of a tensor: that of the first prefix in `groups` at which `name` or a dotted part of it begins.

    `action` matches `action_in_proj.weight` and `model.action_head.bias`, but not `interaction.weight`.
    """
    return next((group for prefix, group in groups.items() if f".{prefix}" in f".{name}"), OTHER)


def coefficients(
    names: Iterable[str],
    alpha: float,
    alpha_by_group: Mapping[str, float],
    groups: Mapping[str, str] = DEFAULT_GROUPS,
    *,
    extrapolate: bool = False,
) -> dict[str, float]:
    """The coefficient of each tensor: its group's in `alpha_by_group`, otherwise `alpha`.

    Raises:
        PerennialError: a coefficient is outside [0, 1] without `extrapolate`, or a group has no tensor.
    """
    require_fraction(alpha, "alpha", extrapolate)
    of_name = {name: group_of(name, groups) for name in names}
    for group, value in alpha_by_group.items():
        if group not in of_name.values():
            raise unknown("parameter group with tensors", group, set(of_name.values()))
        require_fraction(value, f"alpha of {group}", extrapolate)
    return {name: alpha_by_group.get(group, alpha) for name, group in of_name.items()}


def grid(alpha: Sequence[float], by_group: Mapping[str, Sequence[float]]) -> list[Coefficients]:
    """All combinations in ascending order; groups without values of their own share those of `alpha`."""
    own = [by_group.get(group, ()) for group in GROUPS]
    found = set()
    for common in alpha:
        for vision, language, action in itertools.product(*(values or (common,) for values in own)):
            found.add((vision, language, action))
    return sorted(found)


def by_name(groups: Mapping[str, Iterable[str]], coefficients: Coefficients) -> dict[str, float]:
    """The coefficient of every parameter, from the names of the parameters in each of `GROUPS`."""
    of_group = dict(zip(GROUPS, coefficients, strict=True))
    return {name: of_group[group] for group, names in groups.items() for name in names}
