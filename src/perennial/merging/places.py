"""Where an adapter's layers lie in a checkpoint that has published names, or tensors that several layers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.merging.tensor_files import Checkpoint
from perennial.policies._openvla import keys as openvla_keys
from perennial.policies._openvla import settings as openvla_settings
from perennial.policies._pi0 import checkpoint as pi0_checkpoint


@dataclass(frozen=True)
class Place:
    """Where the weight of a layer lies.

    Attributes:
        tensor: name of the tensor.
        row: the first of the layer's rows in it; None where the tensor is the layer's alone.
    """

    tensor: str
    row: int | None = None


def _without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


OWN_NAMES: Mapping[str, Callable[[str], str]] = {
    "pi0": pi0_checkpoint.module_name,
    "smolvla": _without("model."),
}
"""By the type in LeRobot's config.json: our name of a published tensor."""


def places(base: Checkpoint, layers: Mapping[str, int]) -> dict[str, Place]:
    """Where each layer lies in `base`, by the layer's name; its own name where nothing better is known.

    Args:
        base: in our layout, that of a published OpenVLA, or LeRobot's of pi0 or SmolVLA.
        layers: name of a module of ours -> its outputs.
    """
    config = _config(base.path)
    if config.get("model_type") == "openvla":
        first = openvla_settings.first_action_token(config)
        return {
            name: Place(*openvla_keys.published_rows(f"{name}.weight", outputs, first))
            for name, outputs in layers.items()
        }
    # Files beside an OpenVLA-OFT have the prefix of torch's data parallelism.
    own = OWN_NAMES.get(str(config.get("type")), _without("module."))
    tensors = {own(name): name for name in base.entries}
    return {name: Place(tensors.get(f"{name}.weight", f"{name}.weight")) for name in layers}


def _config(folder: Path) -> dict[str, Any]:
    """The config.json beside the weights, empty where there is none that can be read."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
