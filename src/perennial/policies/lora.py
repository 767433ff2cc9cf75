"""Low-rank adapters (Hu et al., arXiv 2106.09685) and the weights that act."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, where PEFT has wrapped it."""
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model


def base_name(name: str) -> str:
    """The base parameter that a parameter belongs to: PEFT's prefixes and adapter parts removed."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    module, adapter, _ = name.partition(".lora_")
    return f"{module}.weight" if adapter else name


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the base parameters with adapters added: W + scale * B A."""
    with torch.no_grad():
        return {base_name(n): p.detach().clone() for n, p in unwrap(model).named_parameters() if ".lora_" not in n}
