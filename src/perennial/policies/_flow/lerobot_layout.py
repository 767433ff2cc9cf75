"""Weights of flow policies in the layout of LeRobot's checkpoints: read by name, and written back as they were."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from perennial.conversion import PICKLED
from perennial.errors import PerennialError
from perennial.merging.tensor_files import refuse_pickles
from perennial.policies._pi0.noise import PREFIX
from perennial.policies._tensors import SHOWN
from perennial.policies.lora import base_shapes, merged_weights

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
REWRITTEN = {INDEX, "manifest.json"}


@dataclass(frozen=True)
class Names:
    """What a family's tensors are called in files.

    Attributes:
        ours: gives the parameter that a tensor of a published or own file belongs to.
        unused: finds in its name what is read by nothing.
    """

    ours: Callable[[str], str]
    unused: re.Pattern[str]


def is_published(folder: Path, kind: str) -> bool:
    """Whether `folder`, a checkpoint of the policy `kind`, is in LeRobot's layout and not in ours."""
    return kind not in json.loads((folder / "config.json").read_text())


@torch.no_grad()
def read_weights(folder: Path, network: nn.Module, names: Names) -> None:
    """Fill every parameter of `network` from the safetensors files in `folder`, one memory-mapped tensor at a time.

    Args:
        folder: of the checkpoint.
        network: whose parameters are filled.
        names: of its tensors.

    Raises:
        PerennialError: a file is damaged, or tensors are missing, unexpected or of another shape.
    """
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        refuse_pickles(folder)
        raise PerennialError(f"The checkpoint {folder} has no model.safetensors; copy the folder again.")
    wanted = {names.ours(name): parameter for name, parameter in network.named_parameters()}
    found: set[str] = set()
    problems: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = names.ours(key)
                    if names.unused.search(name):
                        continue
                    shape = tuple(file.get_slice(key).get_shape())
                    if name not in wanted:
                        problems.append(f"has unexpected {key}")
                    elif shape != tuple(wanted[name].shape):
                        problems.append(f"has {key} of shape {list(shape)} instead of {list(wanted[name].shape)}")
                    elif name not in found:  # the word head and the embedding are one tensor
                        wanted[name].copy_(file.get_tensor(key))
                    found.add(name)
        except (SafetensorError, OSError) as error:
            raise PerennialError(f"{path} cannot be read ({error}); copy the checkpoint again.") from error
    learned = {name for name in wanted if name.startswith(PREFIX)}
    lacking = wanted.keys() - found - (set() if learned & found else learned)  # which begins anew where it is unknown
    problems += [f"lacks {name}" for name in sorted(lacking)]
    _refuse(folder, problems)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise PerennialError(f"{folder} {', '.join(problems[:SHOWN])}{more}; it does not fit its config.json.")


def write(folder: Path, source: Path, model: nn.Module, names: Names, dtype: torch.dtype) -> None:
    """Write the layout again, one file at a time, an adapter merged in.

    Parameters that the source does not have, such as those of Flow-Noise, go into its last file.

    Args:
        folder: is created where needed.
        source: the folder that was read, whose other tensors and files are taken over.
        model: with or without an adapter.
        names: of its tensors.
        dtype: of all weights.

    Raises:
        PerennialError: the source has gone or has changed.
    """
    places = _places(source)
    ours = {names.ours(name): name for name in base_shapes(model)}
    strange = [key for key in places if names.ours(key) not in ours and not names.unused.search(names.ours(key))]
    if not places or strange:
        raise PerennialError(f"{source} has changed since it was read; copy that checkpoint again.")
    folder.mkdir(parents=True, exist_ok=True)
    held = {names.ours(key) for key in places}
    places |= {name: max(places.values()) for renamed, name in ours.items() if renamed not in held}
    for file in sorted(set(places.values())):
        keys = [key for key, place in places.items() if place == file]
        learned = merged_weights(model, {ours[n] for n in map(names.ours, keys) if n in ours})
        with safe_open(source / file, framework="pt") as stored:
            tensors = {
                key: learned[ours[names.ours(key)]] if names.ours(key) in ours else stored.get_tensor(key)
                for key in keys
            }
        written = {key: tensor.to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}
        save_file(written, folder / file, metadata={"format": "pt"})
    _copy_description(folder, source, places)


def _places(source: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's published name."""
    places: dict[str, str] = {}
    for path in sorted(source.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    return places


def _copy_description(folder: Path, source: Path, places: Mapping[str, str]) -> None:
    """Everything that is no weight, pickles left out; an index names the tensors that are there now."""
    weights = set(places.values())
    for path in source.iterdir():
        if path.is_file() and path.suffix not in PICKLED and path.name not in weights | REWRITTEN:
            shutil.copyfile(path, folder / path.name)
    if (source / INDEX).is_file():
        content = json.loads((source / INDEX).read_text(encoding="utf-8"))
        content["weight_map"] = dict(sorted(places.items()))
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
