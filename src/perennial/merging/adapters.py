"""LoRA adapters as what they do to the weights: the products scale * B A, never the factors.

A and B are not unique (B R and R^-1 A give the same product), so averaging or trimming them means nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perennial.errors import PerennialError
from perennial.merging.state_dicts import BLOCK, accumulator
from perennial.merging.tensor_files import BlockReader, Checkpoint, Entry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
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


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA folder: its configuration and its layers by the name of the module they update."""

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @property
    def base(self) -> tuple[str, ...]:
        """What its base is known by: a hash of the weights where it was recorded, otherwise name and revision."""
        name, revision = str(self.config.get("base_model_name_or_path")), str(self.config.get("revision"))
        return (revision,) if revision.startswith("sha256:") else (name, revision)


def is_adapter(path: Path) -> bool:
    """Whether there is a PEFT folder at `path`."""
    return (path / CONFIG).is_file()


def open_adapter(path: Path) -> Adapter:
    """Read a PEFT LoRA folder.

    Raises:
        PerennialError: the folder is missing or damaged, or the adapter is more than products of two factors.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise PerennialError(f"{path} is no readable adapter folder ({error}).") from error
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
    """Base parameter name -> the update scale * B A of a PEFT LoRA folder, float32, in the parameter's shape.

    Each product is computed when it is looked up.

    Raises:
        PerennialError: the folder is missing or damaged, or the adapter is more than products of two factors.
    """
    return _Deltas(open_adapter(folder))


class AdaptedCheckpoint:
    """A base checkpoint with an adapter merged in, as a model to merge: W + scale * B A, computed block by block."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.path = adapter.path
        self.files = (adapter.path / WEIGHTS,)
        self.entries: Mapping[str, Entry] = base.entries
        self._base = base
        self._layers = {f"{name}.weight": layer for name, layer in adapter.layers.items()}
        for name, layer in self._layers.items():
            shape = base.entries[name].shape if name in base.entries else None
            if shape != layer.shape:
                raise PerennialError(
                    f"The adapter {adapter.path} updates {name} of shape {list(layer.shape)}, but in the base "
                    f"{base.path} it is {'missing' if shape is None else list(shape)}; give the adapter's own base."
                )

    def reader(self) -> BlockReader:
        """Open the files."""
        return _AdaptedReader(self._base, self.path / WEIGHTS, self._layers)


class _AdaptedReader:
    def __init__(self, base: Checkpoint, weights: Path, layers: Mapping[str, Layer]) -> None:
        self._base = base.plain_reader()
        self._weights = weights
        self._layers = layers

    def block(self, name: str, number: int) -> Tensor:
        weights = self._base.block(name, number)
        if name not in self._layers:
            return weights
        left, right = self._layers[name].factors()
        start, columns = number * BLOCK, right.shape[1]
        stop = start + weights.numel()
        first = start // columns
        rows = (left[first : -(-stop // columns)] @ right).flatten()
        return weights.to(accumulator(weights)) + rows[start - first * columns : stop - first * columns]

    def hashes(self) -> dict[str, str]:
        return {self._weights.name: hashlib.sha256(self._weights.read_bytes()).hexdigest()}

    def close(self) -> None:
        self._base.close()
