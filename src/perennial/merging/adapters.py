"""LoRA adapters as what they do to the weights: the products scale * B A, never the factors.

A and B are not unique (B R and R^-1 A give the same product), so averaging or trimming them means nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.places import places
from perennial.merging.state_dicts import BLOCK, accumulator
from perennial.merging.tensor_files import BlockReader, Checkpoint, Entry
from perennial.policies._base_identity import SCHEME, identity, spans

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
FORMER = "sha256:"
"""Begins the record of earlier versions, a hash of all weights of the base as they lay in memory."""
KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal"})
"""Named LoRA initialisations that leave the base weights alone (PiSSA, for example, does not)."""


@dataclass(frozen=True)
class Layer:
    """The update of one weight matrix.

    Attributes:
        a: [r, ...inputs], b: [outputs, r, ...] as PEFT stores them.
        scale: of their product.
        embedding: the layer is an embedding, whose factors have names of their own.
        transposed: the weight is stored as [inputs, outputs].
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        inputs, outputs = self.a.shape[1:], self.b.shape[0]
        return (*inputs, outputs) if self.transposed else (outputs, *inputs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left, right), float32, scale included: left @ right is the update with all but the first axis flattened."""
        left, right = self.b.flatten(1).float() * self.scale, self.a.flatten(1).float()
        return (right.T, left.T) if self.transposed else (left, right)

    def delta(self) -> Tensor:
        """The update of the weight, float32, in the weight's shape."""
        left, right = self.factors()
        return (left @ right).view(self.shape)


Update = tuple[int, Layer]
"""A layer, and the first of its rows in a tensor."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA folder: its configuration and its layers by the name of the module they update."""

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @property
    def base(self) -> str:
        """The name of its base."""
        return str(self.config.get("base_model_name_or_path"))

    @property
    def recorded(self) -> str:
        """What we wrote down of the weights of its base; empty for adapters made by others."""
        revision = str(self.config.get("revision"))
        return revision if revision.startswith((SCHEME, FORMER)) else ""

    def shares_base(self, other: Adapter) -> bool:
        """Whether both were trained on the same weights: by our records of them, by name where one has no such."""
        mine, yours = self.recorded, other.recorded
        if mine and yours and mine.partition(":")[0] == yours.partition(":")[0]:
            return mine == yours
        keys = ("base_model_name_or_path",) if mine or yours else ("base_model_name_or_path", "revision")
        return all(self.config.get(key) == other.config.get(key) for key in keys)

    def require_base(self, samples: Mapping[str, Tensor], path: Path) -> None:
        """Check that the weights at `path` are those that the adapter was trained on, if that was recorded.

        Args:
            samples: of the weights that the adapter updates, by name, see `policies._base_identity`.
            path: of the base, for the message.

        Raises:
            PerennialError: they are other ones.
        """
        if self.recorded.startswith(SCHEME) and self.recorded != identity(samples):
            raise PerennialError(
                f"The adapter {self.path} was trained on other weights ({self.base}) than those in {path}; "
                "give its own base."
            )

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """Base parameter name -> the update scale * B A, float32, in the parameter's shape, computed when looked up."""
        return _Deltas(self)

    def split(self, modules: Collection[str]) -> dict[str, dict[str, Layer]]:
        """The layers of each of `modules`, named within it, and under "" those that belong to none of them."""
        layers: dict[str, dict[str, Layer]] = {module: {} for module in ("", *modules)}
        for name, layer in self.layers.items():
            module, _, rest = name.partition(".")
            if module in modules:
                layers[module][rest] = layer
            else:
                layers[""][name] = layer
        return layers


def is_adapter(path: Path) -> bool:
    """Whether there is a PEFT folder at `path`."""
    return (path / CONFIG).is_file()


def learned(path: Path) -> Path:
    """`path`, or the adapter in it, as in the folder that a run keeps of every task."""
    return path / "adapter" if is_adapter(path / "adapter") else path


def open_adapter(path: Path) -> Adapter:
    """Read a PEFT LoRA folder.

    Raises:
        PerennialError: the folder is missing or damaged, or the adapter is more than products of two factors.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise PerennialError(f"{path} is no readable adapter folder ({error}); copy it again.") from error
    initialisation = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise PerennialError(f"{path} is a {config.get('peft_type')} adapter (DoRA or other); only LoRA can be merged.")
    if isinstance(initialisation, str) and initialisation not in KEEPS_BASE:
        raise PerennialError(f"{path} started from {initialisation}, which changes the base; convert it to LoRA first.")
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise PerennialError(f"{path} holds {name}, which is no LoRA factor; merge full checkpoints instead.")
        found.setdefault(match["layer"], {})[match["side"]] = tensor
        if match["embedding"]:
            embeddings.add(match["layer"])
    if not found or any(factors.keys() != {"A", "B"} for factors in found.values()):
        raise PerennialError(f"{path} lacks a factor of a LoRA layer; copy the folder again.")
    layers = {
        name: Layer(
            factors["A"],
            factors["B"],
            _scale(config, name, factors["A"].shape[0]),
            name in embeddings,
            name in embeddings or bool(config.get("fan_in_fan_out")),
        )
        for name, factors in sorted(found.items())
    }
    return Adapter(path, config, layers)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """PEFT's rule: alpha / r or alpha / sqrt(r), where a pattern that ends the layer's name may set alpha."""
    patterns = config.get("alpha_pattern") or {}
    pattern = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)
    alpha = float(config["lora_alpha"] if pattern is None else patterns[pattern])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class _Deltas(Mapping[str, Tensor]):
    """Computes each product when it is asked for, so that one at a time is in memory."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __getitem__(self, name: str) -> Tensor:
        if not name.endswith(".weight"):
            raise KeyError(name)
        return self._adapter.layers[name.removesuffix(".weight")].delta()

    def __iter__(self) -> Iterator[str]:
        return (f"{layer}.weight" for layer in self._adapter.layers)

    def __len__(self) -> int:
        return len(self._adapter.layers)


def delta_weights(folder: Path) -> Mapping[str, Tensor]:
    """`Adapter.deltas` of a PEFT LoRA folder.

    Raises:
        PerennialError: the folder is missing or damaged, or the adapter is more than products of two factors.
    """
    return open_adapter(folder).deltas


class AdaptedCheckpoint:
    """A base checkpoint with an adapter merged in, as a model to merge: W + scale * B A, computed block by block.

    The base may have published names and tensors that several layers share, see `places`.

    Args:
        base: to which the updates are added.
        adapter: of the whole policy.
        beside: modules of it that lie in files of their own.
        module: one of them, where `base` is its file; otherwise the base is all the rest.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, beside: Collection[str] = (), module: str = "") -> None:
        self.path = adapter.path
        self.adapter = adapter
        self.files = (adapter.path / WEIGHTS,)
        self.entries: Mapping[str, Entry] = base.entries
        self._base = base
        self._ranges: dict[str, tuple[str, int, int]] = {}
        self._updates: dict[str, list[Update]] = {}
        layers = adapter.split(beside)[module]
        for name, place in places(base, {name: layer.shape[0] for name, layer in layers.items()}).items():
            layer = layers[name]
            shape = base.entries[place.tensor].shape if place.tensor in base.entries else None
            if shape is None or not _fits(layer.shape, place.row, shape):
                raise PerennialError(
                    f"The adapter {adapter.path} updates {name}.weight of shape {list(layer.shape)}, but in the base "
                    f"{base.path} it is {'missing' if shape is None else list(shape)}; give the adapter's own base."
                )
            first, count = (place.row or 0) * math.prod(layer.shape[1:]), math.prod(layer.shape)
            self._ranges[f"{name}.weight"] = (place.tensor, first, count)
            self._updates.setdefault(place.tensor, []).append((place.row or 0, layer))

    def samples(self) -> dict[str, Tensor]:
        """What the base is recognised by, see `policies._base_identity`: part of every weight that is updated."""
        return {
            name: self._base.numbers(tensor, [(first + start, first + stop) for start, stop in spans(count)])
            for name, (tensor, first, count) in self._ranges.items()
        }

    def reader(self) -> BlockReader:
        """Open the files."""
        return _AdaptedReader(self._base, self.path / WEIGHTS, self._updates)


def _fits(layer: tuple[int, ...], row: int | None, tensor: tuple[int, ...]) -> bool:
    """Whether a weight of shape `layer` is the tensor, or lies in it from `row` on."""
    return layer == tensor if row is None else layer[1:] == tensor[1:] and row + layer[0] <= tensor[0]


class _AdaptedReader:
    def __init__(self, base: Checkpoint, weights: Path, updates: Mapping[str, Sequence[Update]]) -> None:
        self._base = base.plain_reader()
        self._weights = weights
        self._updates = updates

    def block(self, name: str, number: int) -> Tensor:
        weights = self._base.block(name, number)
        start, stop = number * BLOCK, number * BLOCK + weights.numel()
        for row, layer in self._updates.get(name, ()):
            left, right = layer.factors()
            columns = right.shape[1]
            begin, end = max(start, row * columns), min(stop, (row + len(left)) * columns)
            if begin < end:
                first = begin // columns
                rows = (left[first - row : -(-end // columns) - row] @ right).flatten()
                weights = weights.to(accumulator(weights), copy=True)
                weights[begin - start : end - start] += rows[begin - first * columns : end - first * columns]
        return weights

    def hashes(self) -> dict[str, str]:
        return {self._weights.name: hashlib.sha256(self._weights.read_bytes()).hexdigest()}

    def close(self) -> None:
        self._base.close()
