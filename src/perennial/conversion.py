"""`perennial convert`: pickled weights become safetensors, which nothing can hide code in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from perennial.errors import PerennialError

if TYPE_CHECKING:
    from torch import Tensor

PICKLED = (".pt", ".pth", ".bin")
INDEX = ".index.json"


@dataclass(frozen=True)
class Convert:
    """Turn pickled weights (.pt, .pth, .bin) into safetensors beside them, without running code that they may hold."""

    path: Positional[Path]
    """A file, or a folder of which every such file with weights is converted; what is converted already is left."""

    def __call__(self) -> None:
        """Convert and print the new files."""
        if not self.path.is_dir():
            (path,) = pickled_files(self.path)
            print(convert(path))
            return
        for line in convert_folder(self.path):
            print(line)


def pickled_files(path: Path) -> list[Path]:
    """`path` itself, or the pickles in the folder `path`.

    Raises:
        PerennialError: there are none.
    """
    found = sorted(p for p in path.iterdir() if p.suffix in PICKLED) if path.is_dir() else [path]
    if not found or not found[0].is_file() or found[0].suffix not in PICKLED:
        raise PerennialError(
            f"{path} is no file that ends in {', '.join(PICKLED)} and no folder with some; name pickled weights."
        )
    return found


def convert(path: Path) -> Path:
    """Write the tensors pickled in `path` to a safetensors file beside it and return that; `path` stays.

    Raises:
        PerennialError: the file holds anything but named tensors, is damaged, or the new file exists already.
    """
    from safetensors.torch import save_file

    target = path.with_name(_safe_name(path.name))
    if target.exists():
        raise PerennialError(f"{target} exists already; move it away to convert {path.name} again.")
    tensors = _unpickle(path)
    half = target.with_suffix(".part")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, half, metadata={"format": "pt"})
    half.replace(target)
    return target


def convert_folder(folder: Path) -> Iterator[str]:
    """Convert every file of weights in `folder` that has not been, and their index; say of each file what came of it.

    Optimizer states and settings that lie beside weights are left alone.

    Raises:
        PerennialError: there is no pickle, nothing could be converted, or a file that the index names could not.
    """
    failed: dict[str, PerennialError] = {}
    files = pickled_files(folder)
    for path in files:
        if (target := path.with_name(_safe_name(path.name))).exists():
            yield f"{target} exists already"
            continue
        try:
            yield str(convert(path))
        except PerennialError as error:
            failed[path.name] = error
            yield f"{path} is left as it is"
    needed = files if len(failed) == len(files) else [folder / name for name in _indexed(folder)]
    for path in needed:
        if path.name in failed:
            raise failed[path.name]
    if (index := convert_index(folder)) is not None:
        yield str(index)


def _indexed(folder: Path) -> frozenset[str]:
    """The files that an index of pickles in `folder` names."""
    path = folder / f"pytorch_model.bin{INDEX}"
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # `convert_index` says what is wrong with it
        return frozenset()


def convert_index(folder: Path) -> Path | None:
    """Write the index of converted weights that were split among several files, where `folder` has one of pickles.

    Raises:
        PerennialError: the index cannot be read, or the new one not written.
    """
    from perennial.storage import atomic

    path, target = folder / f"pytorch_model.bin{INDEX}", folder / f"model.safetensors{INDEX}"
    if not path.is_file() or target.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["weight_map"] = {name: _safe_name(file) for name, file in content["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PerennialError(f"{path} is no index of a checkpoint ({error!r}); copy it again.") from error
    atomic.write_text(target, json.dumps(content, indent=2) + "\n")
    return target


def _safe_name(pickled: str) -> str:
    """What a file is called once it is safetensors; transformers calls its weights by another name then."""
    return Path(pickled).with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)


def _unpickle(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes about a broken file, and advises to load it unsafely
        raise PerennialError(
            f"{path} holds more than weights or is damaged ({type(error).__name__}); nothing was run or written, ask "
            "for safetensors."
        ) from None
    if not isinstance(content, dict) or not content or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise PerennialError(f"{path} holds no dictionary of named tensors; convert a file of weights only.")
    return {str(name): tensor for name, tensor in content.items()}
