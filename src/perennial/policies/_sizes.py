"""Narrower and wider networks of the same shape."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

Config = TypeVar("Config")

WIDTHS = ("width", "mlp_width", "projector_width", "head_dim")
"""What the configurations of all policies call the widths of their layers."""
STEP = 1 / 2
"""A width that is a multiple of it leaves the small defaults whole heads."""


def widened(config: Config, width: float) -> Config:
    """`config`, with every width `width` times as large, also in the dataclasses inside; layers and heads stay."""
    changes = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = widened(value, width)
        elif f.name in WIDTHS:
            changes[f.name] = round(value * width)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
