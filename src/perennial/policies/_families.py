"""What a checkpoint folder is, by its config.json, for sentences about what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perennial import discovery
from perennial.errors import PerennialError


def kind_of(values: Mapping[str, Any]) -> str | None:
    """What config.json says it describes: ours say the policy, LeRobot's the type, those of transformers the model."""
    return next((str(values[key]) for key in ("policy", "type", "model_type") if values.get(key)), None)


def wrong_family(folder: Path, values: Mapping[str, Any], wanted: str) -> PerennialError:
    """The error for a checkpoint that the policy `wanted` cannot read; names the policy that can."""
    found = kind_of(values)
    if found is None:
        return PerennialError(f"config.json in {folder} describes no policy; choose a checkpoint of {wanted}.")
    advice = f"set --policy.name {found}" if found in discovery.names("policies") else f"choose one of {wanted}"
    return PerennialError(f"{folder} is a checkpoint of {found!r}, which {wanted} cannot read; {advice}.")
