"""Reading and writing published OpenVLA checkpoints: a folder as it lies on the Hugging Face hub.

It has config.json with `"model_type": "openvla"`, a Llama tokenizer, and one or several safetensors files with an
index. Weights are mapped into memory, so a model takes its own size once. What is written has the same files and the
same tensors, those included that nothing here depends on: they are streamed from the folder that was read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perennial.errors import PerennialError
from perennial.merging.tensor_files import Checkpoint, open_checkpoint
from perennial.policies._openvla.config import OpenVLAOFTConfig
from perennial.policies._openvla.keys import (
    CLASS_POSITION,
    CLASS_TOKEN,
    SIDE,
    Published,
    key_map,
    to_ours,
    to_published,
)
from perennial.policies._openvla.settings import SETTINGS, Settings, read_config, read_json, read_settings
from perennial.policies._tensors import refuse_mismatch
from perennial.policies._tokenizer import read_tokenizer
from perennial.policies.lora import base_shapes, merged_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMPTY_TOKEN = "▁"
KEPT = {".json", ".txt", ".model", ".py", ".md", ".jinja"}
"""Endings of the files that are copied when a checkpoint is written; pickles are not."""
INDEX = "model.safetensors.index.json"
REWRITTEN = {"manifest.json", "config.json", INDEX, SETTINGS}


@dataclass(frozen=True)
class Source:
    """The published folder that a policy was read from."""

    folder: Path
    settings: Settings


def is_published(folder: Path) -> bool:
    """Whether config.json in `folder` is that of a published OpenVLA.

    Raises:
        PerennialError: there is no config.json, or it cannot be read.
    """
    return read_json(folder / "config.json").get("model_type") == "openvla"


def read_description(folder: Path, chunk: int, regression: bool = False) -> tuple[Source, OpenVLAOFTConfig, Tokenizer]:
    """Everything but the weights.

    Args:
        folder: as published.
        chunk: actions per decision where perennial.json leaves it open.
        regression: the action head is a file of its own, not the language model's.

    Raises:
        PerennialError: a file is missing or damaged, the architecture is another one, or the action head is.
    """
    heads = sorted(path.name for path in folder.glob("action_head--*"))
    if heads and not regression:
        raise PerennialError(
            f"{folder} was trained with the regression head {heads[0]}, which gives no log-probabilities, so its "
            "action tokens mean nothing; choose a checkpoint whose language-model head was trained, or evaluate and "
            "imitate with --policy.name openvla_oft_l1."
        )
    settings = read_settings(folder)
    tokenizer = read_tokenizer(folder, "copy or download the folder again")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = read_config(folder, settings, chunk, tokenizer.token_to_id(EMPTY_TOKEN))
    _check_action_tokens(folder, tokenizer, config)
    config = replace(config, regression=regression)
    return Source(folder, settings), config, tokenizer


def _check_action_tokens(folder: Path, tokenizer: Tokenizer, config: OpenVLAOFTConfig) -> None:
    """See that the last entries of the tokenizer, which stand for actions, are those that config.json means."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    if size != config.vocab_size:
        ranges = [f"{end - config.action_bins} to {end - 1}" for end in (size, config.vocab_size)]
        raise PerennialError(
            f"The action tokens of the tokenizer in {folder} are {ranges[0]}, but those of its config.json are "
            f"{ranges[1]}; copy the tokenizer.json that belongs to it."
        )


def read_weights(
    source: Source, config: OpenVLAOFTConfig, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    """Give `model`, whose parameters may lie on the meta device, the weights of the published folder.

    Weights that are stored as `dtype` stay in the file, mapped into memory; writing to them does not change it.

    Raises:
        PerennialError: a file is truncated, or tensors are missing, unexpected or of another shape.
    """
    shapes = base_shapes(model)
    published = key_map(config, shapes)
    checkpoint = open_checkpoint(source.folder)
    found = {name: entry.shape for name, entry in checkpoint.entries.items()}
    refuse_mismatch(source.folder, found, {name: entry.shape for name, entry in published.items()})
    weights: dict[str, Tensor] = {}
    for file, names in _by_file(checkpoint).items():
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                if published[name].parts:
                    stored = tensors.get_tensor(name)
                    for ours, weight in to_ours(name, published[name], stored, shapes).items():
                        weights[ours] = weight.to(device, dtype)
    for module in _side_modules(shapes):
        weights |= {
            name: weight.to(device, dtype) for name, weight in _read_side(source.folder, module, shapes).items()
        }
    model.load_state_dict(weights, assign=True)


def write_checkpoint(
    folder: Path, source: Source, config: OpenVLAOFTConfig, model: nn.Module, dtype: torch.dtype
) -> None:
    """Write the published layout again, one file at a time, an adapter merged in.

    Args:
        folder: is created where needed.
        source: the folder that was read, whose other tensors and files are taken over.
        config: of the model.
        model: with or without an adapter.
        dtype: of all tensors.

    Raises:
        PerennialError: the source has gone or has changed.
    """
    checkpoint = open_checkpoint(source.folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = base_shapes(model)
    published = key_map(config, shapes)
    found = {name: entry.shape for name, entry in checkpoint.entries.items()}
    refuse_mismatch(source.folder, found, {name: entry.shape for name, entry in published.items()})
    for file, names in _by_file(checkpoint).items():
        ours = merged_weights(model, _needed(names, published))
        with safe_open(file, framework="pt") as tensors:
            written = {
                name: to_published(name, published[name], ours, tensors.get_tensor(name)).to("cpu", dtype).contiguous()
                for name in names
            }
        save_file(written, folder / file.name, metadata={"format": "pt"})
    for module in _side_modules(shapes):
        ours = merged_weights(model, {name for name in shapes if name.startswith(f"{module}.")})
        tensors = {name.removeprefix(f"{module}."): weight.to("cpu", dtype) for name, weight in ours.items()}
        save_file(tensors, folder / f"{module}--0_checkpoint.safetensors", metadata={"format": "pt"})
    _write_index(folder, checkpoint, dtype)
    _copy_description(folder, source, dtype)


def _side_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Those of `SIDE` that the model has."""
    return [module for module in SIDE if any(name.startswith(f"{module}.") for name in shapes)]


def _read_side(folder: Path, module: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters of `module`, which OpenVLA-OFT publishes in a file of their own.

    Raises:
        PerennialError: there is no safetensors file, or its tensors do not fit.
    """
    found = sorted(folder.glob(f"{module}--*.safetensors"))
    if len(found) != 1:
        pickled = next(folder.glob(f"{module}--*.pt"), None)
        advice = (
            f"{pickled.name} is a pickle, which is not opened here: convert it by `perennial convert {pickled}`"
            if pickled and not found
            else "copy the published one into it"
            if not found
            else "keep one of them"
        )
        raise PerennialError(f"{folder} has {len(found)} files {module}--*.safetensors, but needs one; {advice}.")
    tensors = {f"{module}.{name.removeprefix('module.')}": tensor for name, tensor in load_file(found[0]).items()}
    wanted = {name: shape for name, shape in shapes.items() if name.startswith(f"{module}.")}
    refuse_mismatch(found[0], {name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
    return tensors


def _by_file(checkpoint: Checkpoint) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        files.setdefault(entry.file, []).append(name)
    return files


def _needed(names: Collection[str], published: Mapping[str, Published]) -> set[str]:
    """Our parameters that the published tensors `names` are made of."""
    needed = {part for name in names for part in published[name].parts}
    return needed | ({CLASS_POSITION} if CLASS_TOKEN in names else set())


def _write_index(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """The index, where the source has several files."""
    if len(checkpoint.files) == 1 and not (checkpoint.path / INDEX).is_file():
        return
    size = sum(math.prod(entry.shape) for entry in checkpoint.entries.values()) * dtype.itemsize
    files = {name: entry.file.name for name, entry in sorted(checkpoint.entries.items())}
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def _copy_description(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """Everything that is no weight; config.json says the type of the weights."""
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix in KEPT and path.name not in REWRITTEN:
            shutil.copyfile(path, folder / path.name)
    config = read_json(source.folder / "config.json")
    if "torch_dtype" in config:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    if settings := source.settings.to_json():
        _write_json(folder / SETTINGS, settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
