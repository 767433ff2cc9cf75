"""Reading and writing the weights of a module as safetensors, with errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    _refuse(path, "lacks", wanted.keys() - tensors.keys())
    _refuse(path, "has unexpected", tensors.keys() - wanted.keys())
    wrong = (name for name, tensor in tensors.items() if tensor.shape != wanted[name].shape)
    _refuse(
        path,
        "has tensors of another shape than config.json says:",
        (f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}" for name in wrong),
    )
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})


def _refuse(path: Path, problem: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise PerennialError(f"{path} {problem} {', '.join(found[:SHOWN])}{more}; it does not fit this policy.")
