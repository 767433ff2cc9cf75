"""Low-rank adapters (Hu et al., arXiv 2106.09685), which parameters learn, and the weights that act."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from perennial.errors import PerennialError, not_installed, unknown
from perennial.policies._base_identity import SCHEME, identity, sample
from perennial.policies._groups import GROUPS
from perennial.policies._tensors import write_tensors
from perennial.randomness import integer_seed

if TYPE_CHECKING:
    from perennial.policies.base import Policy

ALIGNMENT = 16
"""Float32 numbers to a 64-byte cache line; every weight in a flat float32 buffer starts on one."""

Layout = tuple[tuple[str, int, tuple[int, ...]], ...]
"""Name, offset and shape of every weight in a flat buffer."""


@dataclass(frozen=True)
class LoRA:
    """An adapter on every linear layer: W + alpha / rank * B A, with B zero at first, so nothing changes.

    Attributes:
        rank, alpha: of every layer.
        rank_by_group: rank of the layers of a parameter group, where it differs.
    """

    rank: int = 16
    alpha: int = 16
    rank_by_group: Mapping[str, int] = field(default_factory=dict)


def add_adapter(policy: Policy, lora: LoRA, seed: int) -> None:
    """Wrap `policy.model` by PEFT: A is Gaussian with standard deviation 1 / rank, named by `seed`; the base freezes.

    Raises:
        PerennialError: there is an adapter already, or `rank_by_group` names an unknown group.
    """
    peft = _peft()
    if is_wrapped(policy.model):
        raise PerennialError("The policy has an adapter already; load its base checkpoint again to add another.")
    for group in lora.rank_by_group:
        if group not in policy.groups:
            raise unknown("parameter group", group, policy.groups)
    of_parameter = {name: group for group, names in policy.groups.items() for name in names}
    linear = [name for name, module in policy.model.named_modules() if isinstance(module, nn.Linear)]
    ranks = {name: lora.rank_by_group.get(of_parameter[f"{name}.weight"], lora.rank) for name in linear}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        rank_pattern={name: rank for name, rank in ranks.items() if rank != lora.rank},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "adapter"))
        policy.model = peft.get_peft_model(policy.model, config).eval()


def is_wrapped(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model."""
    return hasattr(model, "get_base_model")


def unwrap(model: nn.Module) -> nn.Module:
    """The model's own module, where PEFT has wrapped it; the layers inside still carry the adapter."""
    base: nn.Module = model.get_base_model() if is_wrapped(model) else model  # type: ignore[operator]
    return base


def base_name(name: str) -> str:
    """The base parameter that a parameter belongs to: PEFT's prefixes and adapter parts removed.

    `base_model.model.projector.fc1.lora_A.default.weight` and `base_model.model.projector.fc1.base_layer.weight`
    both belong to `projector.fc1.weight`.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    module, adapter, _ = name.partition(".lora_")
    return f"{module}.weight" if adapter else name


def set_trainable(policy: Policy, groups: Collection[str] = GROUPS) -> None:
    """Let exactly the parameters of `groups` learn: the adapter's where there is one, the base's otherwise.

    Raises:
        PerennialError: there is no such group.
    """
    for group in groups:
        if group not in policy.groups:
            raise unknown("parameter group", group, policy.groups)
    chosen = {name for group in groups for name in policy.groups[group]}
    adapter = is_wrapped(policy.model)
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(base_name(name) in chosen and (".lora_" in name) == adapter)


@torch.no_grad()
def fold_adapter(policy: Policy, seed: int) -> None:
    """Add the adapter's update to the base's own weights and begin a new adapter: the policy acts as before.

    The new adapter has the same ranks; A is drawn as in `add_adapter`, named by `seed`, and B is zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "adapter"))
        for module in unwrap(policy.model).modules():
            if hasattr(module, "lora_A"):
                module.base_layer.weight += module.get_delta_weight("default")  # type: ignore[operator,union-attr]
                module.reset_lora_parameters("default", init_lora_weights="gaussian")  # type: ignore[operator]


@torch.no_grad()
def merged_weights(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Detached copies of base parameters by base name, the active adapters added: W + scale * B A.

    Args:
        model: with or without adapters.
        names: of the parameters; None takes all.
    """
    weights = {
        base_name(name): parameter.detach().clone()
        for name, parameter in unwrap(model).named_parameters()
        if ".lora_" not in name and (names is None or base_name(name) in names)
    }
    for name, module in unwrap(model).named_modules():
        if hasattr(module, "lora_A") and f"{name}.weight" in weights:
            for adapter in module.active_adapters:  # type: ignore[union-attr]
                weights[f"{name}.weight"] += module.get_delta_weight(adapter)  # type: ignore[operator]
    return weights


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all base parameters by base name."""
    parameters = unwrap(model).named_parameters()
    return {base_name(name): tuple(p.shape) for name, p in parameters if ".lora_" not in name}


def flatten(weights: Mapping[str, Tensor], out: Tensor | None = None) -> tuple[Tensor, Layout]:
    """Put `weights` one after another into one buffer, for example to share it with other processes.

    The buffer has the weights' type, float32 where they differ in it.

    Args:
        weights: by name, in a fixed order.
        out: an earlier buffer of the same layout to overwrite; models bound to it act with the new weights at once.
    """
    layout, size = [], 0
    for name, tensor in weights.items():
        layout.append((name, size, tuple(tensor.shape)))
        size += math.ceil(tensor.numel() / ALIGNMENT) * ALIGNMENT
    kinds = {tensor.dtype for tensor in weights.values()}
    flat = torch.zeros(size, dtype=kinds.pop() if len(kinds) == 1 else torch.float32) if out is None else out
    for name, offset, shape in layout:
        flat[offset : offset + math.prod(shape)].view(shape).copy_(weights[name])
    return flat, tuple(layout)


def bind(model: nn.Module, flat: Tensor, layout: Layout) -> None:
    """Make every parameter of `model` a view into `flat`, without copying."""
    parameters = dict(model.named_parameters())
    for name, offset, shape in layout:
        parameters[name].data = flat[offset : offset + math.prod(shape)].view(shape)


def save_adapter(policy: Policy, folder: Path, base: str) -> None:
    """Write the adapter as a standard PEFT folder.

    Args:
        policy: with an adapter.
        folder: is created.
        base: name or path of the base checkpoint, for people; `revision` records what its weights are recognised by.
    """
    peft = _peft()
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = policy.model.peft_config["default"]  # type: ignore[union-attr,index]
    if not str(config.revision).startswith(SCHEME):  # once: the base is frozen
        adapted = {base_name(name) for name, _ in policy.model.named_parameters() if ".lora_" in name}
        config.revision = fingerprint(policy.model, adapted)
    content = config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(content, indent=2, sort_keys=True, default=sorted)  # sets become sorted lists
    (folder / "adapter_config.json").write_text(text + "\n")
    tensors = peft.get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    write_tensors(folder / "adapter_model.safetensors", tensors)


def load_adapter(policy: Policy, folder: Path) -> None:
    """Replace the policy's adapter, if it has one, by the one in `folder`; its parameters learn.

    The base is compared with the one that `save_adapter` recorded; adapters made by others have no such record.

    Raises:
        PerennialError: the folder is missing or truncated, or its adapter was trained on another base.
    """
    peft = _peft()
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, revision = config["base_model_name_or_path"], str(config.get("revision"))
    except (OSError, ValueError, KeyError) as error:
        raise PerennialError(f"{folder} is not an adapter folder ({error!r}); choose another one.") from error
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
            adapted = {base_name(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    if revision.startswith(SCHEME) and revision != fingerprint(policy.model, adapted):
        raise PerennialError(f"The adapter in {folder} was trained on other weights ({base}); load that base first.")
    if is_wrapped(policy.model):
        policy.model = policy.model.unload()  # type: ignore[operator]
    try:
        policy.model = peft.PeftModel.from_pretrained(policy.model, folder, is_trainable=True).eval()
    except Exception as error:  # PEFT raises what it likes about a folder that it cannot use
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> PerennialError:
    return PerennialError(f"The adapter in {folder} cannot be read ({error}); copy the folder again.")


def fingerprint(model: nn.Module, names: Collection[str]) -> str:
    """What the base is recognised by, see `_base_identity.identity`; an adapter does not change it.

    Args:
        model: with or without an adapter.
        names: of the base parameters that the adapter updates.
    """
    base = ((base_name(name), p) for name, p in model.named_parameters() if ".lora_" not in name)
    return identity({name: sample(parameter) for name, parameter in base if name in names})


def _peft() -> ModuleType:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise not_installed("peft, which makes adapters,", "vla", error) from error
    module: ModuleType = peft
    return module
