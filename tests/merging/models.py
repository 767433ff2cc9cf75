"""Small checkpoints in several layouts, to be merged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHAPES = {
    "vision_backbone.featurizer.weight": (33, 5),
    "projector.fc1.bias": (17,),
    "language_model.model.layers.0.weight": (1500, 1400),  # two blocks
    "language_model.lm_head.weight": (8, 4),
}
SHARDS = {"model-00001-of-00002.safetensors": 2, "model-00002-of-00002.safetensors": 4}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return state | {"position_ids": torch.arange(6), "mask": torch.full((2, 2), -math.inf).to(dtype)}


def write(folder: Path, state: dict[str, torch.Tensor], sharded: bool = False) -> Path:
    folder.mkdir()
    if not sharded:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: state[name] for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
