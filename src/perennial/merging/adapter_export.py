"""Merges LoRA adapters with each other and writes a standard PEFT folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import perennial
from perennial.errors import PerennialError, unknown
from perennial.merging.adapters import CONFIG, PREFIX, WEIGHTS, Adapter, Layer, open_adapter
from perennial.merging.checkpoints import PROVENANCE
from perennial.merging.dare import dare, require_dare
from perennial.merging.folders import whole_folder
from perennial.merging.state_dicts import require_fraction, require_same_tensors
from perennial.merging.ties import elect_and_average, require_ties, trim_threshold

Factors = tuple[Tensor, Tensor]
"""(B [outputs, rank], A [rank, inputs]) of a layer, scale included, further axes flattened."""

Product = Factors | Tensor
"""The merged update of a layer, where it can be as factors, otherwise as a matrix [outputs, inputs]."""


@dataclass(frozen=True)
class AdapterReport:
    """What a merge of adapters did.

    Attributes:
        rank: of every layer.
        residual: relative Frobenius error of all layers together against the merged products; 0 is exact.
        residual_by_layer: the same for each layer.
    """

    rank: int
    residual: float
    residual_by_layer: Mapping[str, float]


def merge_adapters(
    adapters: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.2,
    drop: float = 0.9,
    seed: int = 0,
) -> AdapterReport:
    """Merge n adapters D_i = scale_i * B_i A_i of one base and write the result D to the new PEFT folder `out`.

    - "linear": D = sum_i w_i D_i. Without `rank` the factors are put side by side, which is exact; ranks add up.
    - "ties", "dare": of the task vectors n w_i D_i and w_i D_i over a base of zero, see `ties` and `dare`. With
      nothing trimmed, dropped or in conflict both equal "linear".

    With `rank`, and for "ties" and "dare" (rank: the sum of all by default), each D is cut to its largest singular
    values, the best approximation of that rank (Eckart & Young 1936), and the residual is reported.

    Args:
        adapters: PEFT LoRA folders with the same layers.
        out: must not exist; it appears when it is complete.
        weights: w_i, any finite numbers, 1 / n by default.
        method: "linear", "ties" or "dare".
        rank: of the result.
        density: fraction that TIES keeps, in (0, 1].
        drop: fraction that DARE drops, in [0, 1).
        seed: of the masks of DARE.

    Raises:
        PerennialError: the adapters have different bases or layers, an argument is out of range, or `out` exists.
    """
    opened = [open_adapter(path) for path in adapters]
    weights = [1 / max(1, len(opened))] * len(opened) if weights is None else list(weights)
    _require_fit(opened, weights, rank)
    products: Mapping[str, Callable[[], Iterable[tuple[str, Product]]]] = {
        "linear": lambda: _side_by_side(opened, weights),
        "ties": lambda: _ties(opened, weights, density),
        "dare": lambda: _dare(opened, weights, drop, seed),
    }
    if method not in products:
        raise unknown("merge method for adapters", method, products)
    summed = max(sum(adapter.layers[name].a.shape[0] for adapter in opened) for name in opened[0].layers)
    report, tensors = _factorise(opened[0], products[method](), rank or summed, method == "linear" and rank is None)
    record = {
        "perennial": perennial.__version__,
        "method": method,
        "rank": report.rank,
        "residual": report.residual,
        "adapters": _origins(opened, weights),
    }
    with whole_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.dumps(_config(opened, report.rank), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return report


def _factorise(
    like: Adapter, products: Iterable[tuple[str, Product]], rank: int, exact: bool
) -> tuple[AdapterReport, dict[str, Tensor]]:
    """Named factors of `rank` for every product, in PEFT's shapes, and how well they fit."""
    tensors: dict[str, Tensor] = {}
    lost, whole = {}, {}
    for name, product in products:
        if exact and not isinstance(product, Tensor):
            (b, a), lost[name], whole[name] = product, 0.0, 0.0
        else:
            (b, a), lost[name], whole[name] = _truncate(product, rank)
        tensors |= _named(name, like.layers[name], _pad(b, rank, 1), _pad(a, rank, 0))
    by_layer = {name: math.sqrt(lost[name] / whole[name]) if lost[name] else 0.0 for name in lost}
    residual = math.sqrt(sum(lost.values()) / sum(whole.values())) if any(lost.values()) else 0.0
    return AdapterReport(rank, residual, by_layer), tensors


def _require_fit(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None) -> None:
    if not adapters or len(weights) != len(adapters):
        raise PerennialError(f"{len(adapters)} adapters cannot be merged with {len(weights)} weights; give one each.")
    if rank is not None and rank < 1:
        raise PerennialError(f"The rank is {rank}, but it must be at least 1.")
    for weight in weights:
        require_fraction(weight, "an adapter's weight", extrapolate=True)
    first = adapters[0]
    for other in adapters[1:]:
        require_same_tensors(_shapes(first), _shapes(other), f"adapter {other.path}")
        if not other.shares_base(first):
            raise PerennialError(
                f"{other.path} was trained on {_origin(other)}, but {first.path} on {_origin(first)}; "
                "only adapters of one base can be merged."
            )


def _origin(adapter: Adapter) -> str:
    return f"{adapter.base} (weights {adapter.recorded[:16]})" if adapter.recorded else adapter.base


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: layer.shape for name, layer in adapter.layers.items()}


def _side_by_side(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterable[tuple[str, Product]]:
    """[w_1 s_1 B_1, w_2 s_2 B_2, ...] times A_1 on top of A_2 on top of ... is the sum of the products."""
    for name in adapters[0].layers:
        layers = [adapter.layers[name] for adapter in adapters]
        b = torch.cat(
            [layer.b.flatten(1).float() * (layer.scale * w) for layer, w in zip(layers, weights, strict=True)], 1
        )
        yield name, (b, torch.cat([layer.a.flatten(1).float() for layer in layers]))


def _dense(adapter: Adapter, name: str, weight: float) -> Tensor:
    layer = adapter.layers[name]
    return (layer.b.flatten(1).float() * (layer.scale * weight)) @ layer.a.flatten(1).float()


def _ties(adapters: Sequence[Adapter], weights: Sequence[float], density: float) -> Iterable[tuple[str, Product]]:
    require_ties(len(adapters), density)
    scaled = [weight * len(adapters) for weight in weights]
    names = adapters[0].layers
    pairs = list(zip(adapters, scaled, strict=True))
    thresholds = [trim_threshold(lambda a=a, w=w: (_dense(a, n, w) for n in names), density) for a, w in pairs]  # type: ignore[misc]
    for name in names:
        deltas = [_dense(adapter, name, weight) for adapter, weight in pairs]
        yield name, elect_and_average(torch.zeros_like(deltas[0]), deltas, thresholds, 1.0)


def _dare(
    adapters: Sequence[Adapter], weights: Sequence[float], drop: float, seed: int
) -> Iterable[tuple[str, Product]]:
    require_dare(len(adapters), drop)
    for name in adapters[0].layers:
        deltas = [{name: _dense(adapter, name, weight)} for adapter, weight in zip(adapters, weights, strict=True)]
        yield name, dare({name: torch.zeros_like(deltas[0][name])}, deltas, drop=drop, seed=seed)[name]


def _truncate(product: Product, rank: int) -> tuple[Factors, float, float]:
    """The best factors of `rank`, and the squared Frobenius norms of what is lost and of the whole."""
    u, values, v = _singular_values(product)
    root = values[:rank].sqrt()
    factors = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
    squares = values.double().square()
    return factors, squares[rank:].sum().item(), squares.sum().item()


def _singular_values(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V^T; of factors through the small core of two QR decompositions, in float64."""
    if isinstance(product, Tensor):
        u, values, v = torch.linalg.svd(product, full_matrices=False)
        return u, values, v
    left, left_core = torch.linalg.qr(product[0].double())
    right, right_core = torch.linalg.qr(product[1].double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, values, v @ right.T


def _pad(factor: Tensor, rank: int, axis: int) -> Tensor:
    """The factor with zeros up to `rank`, which do not change the product."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _named(name: str, like: Layer, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The factors in PEFT's names and shapes."""
    infix, suffix = ("lora_embedding_", "") if like.embedding else ("lora_", ".weight")
    return {
        f"{PREFIX}{name}.{infix}A{suffix}": a.reshape(-1, *like.a.shape[1:]).contiguous(),
        f"{PREFIX}{name}.{infix}B{suffix}": b.reshape(like.b.shape[0], -1, *like.b.shape[2:]).contiguous(),
    }


def _config(adapters: Sequence[Adapter], rank: int) -> dict[str, object]:
    """The first adapter's configuration with scale 1; layers are named one by one where the adapters differ."""
    targets = [sorted(t) if isinstance(t := adapter.config["target_modules"], list) else t for adapter in adapters]
    return {
        **adapters[0].config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": targets[0] if all(t == targets[0] for t in targets) else sorted(adapters[0].layers),
    }


def _origins(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[dict[str, object]]:
    return [
        {
            "path": str(adapter.path),
            "sha256": hashlib.sha256((adapter.path / WEIGHTS).read_bytes()).hexdigest(),
            "weight": weight,
        }
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
