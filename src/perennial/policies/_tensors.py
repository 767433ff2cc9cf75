"""Reading and writing the weights of a module as safetensors, with errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perennial.errors import PerennialError

SHOWN = 10


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write `tensors` to `path`, converted to `dtype` if one is given."""
    plain = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def read_tensors(path: Path, model: nn.Module) -> None:
    """Replace every parameter and persistent buffer of `model` by the tensor of its name in `path`.

    Raises:
        PerennialError: the file is truncated, or tensors are missing, unexpected or of another shape.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PerennialError(f"{path} cannot be read ({error}); copy the checkpoint again.") from error
    wanted = model.state_dict()
    refuse_mismatch(path, *({name: tuple(t.shape) for name, t in both.items()} for both in (tensors, wanted)))
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})


def refuse_mismatch(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of tensors by name.

    Raises:
        PerennialError: it names those that are missing, unexpected or of another shape.
    """
    wrong = [name for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    problems = {
        "lacks": wanted.keys() - found.keys(),
        "has unexpected": found.keys() - wanted.keys(),
        "has tensors of another shape than config.json says:": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in wrong
        ],
    }
    said = [f"{problem} {_some(names)}" for problem, names in problems.items() if names]
    if said:
        raise PerennialError(f"{path} {' and '.join(said)}; it does not fit this policy.")


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
