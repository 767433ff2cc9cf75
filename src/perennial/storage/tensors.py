"""Named tensors and the state of AdamW in safetensors files; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perennial.errors import PerennialError


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors of any shape and type; tensors that share memory are written separately."""
    storages: set[int] = set()
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        flat[name] = copy
    save_file(flat, path)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, bit for bit.

    Raises:
        PerennialError: the file is missing, truncated or no safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
        return tensors
    except FileNotFoundError:
        raise PerennialError(f"The tensor file {path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise PerennialError(f"The tensor file {path} cannot be read ({error}); restore it from a copy.") from None


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Write what the optimiser remembers, as `kind/parameter name` -> tensor, for example `exp_avg/head.weight`.

    Learning rates and other hyper-parameters are not written; they come from the configuration.

    Args:
        optimizer: torch's AdamW, or another one whose state is tensors only.
        parameters: the parameters that it trains, by name.
        path: of the safetensors file.
    """
    state = {
        f"{kind}/{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    save_tensors(state, path)


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Give a freshly built optimiser the memory that `save_optimizer` took from its predecessor.

    Raises:
        PerennialError: the file cannot be read, or a tensor in it belongs to no parameter of the optimiser or has
            another shape.
    """
    order = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    by_index: dict[int, dict[str, Tensor]] = {}
    for key, value in load_tensors(path).items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in order:
            raise PerennialError(f"{path} has {key!r}, but the policy does not train {name!r}.")
        if value.dim() and value.shape != parameter.shape:
            raise PerennialError(
                f"{key!r} in {path} has shape {tuple(value.shape)}, but the parameter {name!r} has "
                f"{tuple(parameter.shape)}; the policy is not the one that was saved."
            )
        by_index.setdefault(order[parameter], {})[kind] = value
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
