"""Merges safetensors checkpoints of any size on disk.

The result has the layout of the base: the same files, names, types and order, with its configuration, tokenizer and
statistics beside. `streaming` does the work in constant memory.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import perennial
from perennial.errors import PerennialError
from perennial.merging.adapters import AdaptedCheckpoint, is_adapter, learned, open_adapter
from perennial.merging.block_methods import Settings
from perennial.merging.folders import require_new, require_space, whole_folder
from perennial.merging.groups import DEFAULT_GROUPS, coefficients, group_of
from perennial.merging.state_dicts import require_same_tensors
from perennial.merging.streaming import Merge, Progress
from perennial.merging.tensor_files import DTYPES, Model, open_checkpoint

PROVENANCE = "merge_provenance.json"
OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf"})
"""Weights in formats that are not merged: a copy of the base's would be mistaken for the merged model's."""

ABOUT_THE_BASE = frozenset({"manifest.json", "pretraining.json"})
"""Hashes of the base's files and what it was measured to do, neither of which holds for the merged model."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the merged checkpoint.
        tensors: how many it has.
        changed: how many of them differ between the models.
        size: bytes of weights.
        alpha_by_group: coefficient of each parameter group that has tensors.
        tensors_by_group: number of tensors of each group.
        left_out: files of the base that were not copied since they hold weights in another format.
    """

    out: Path
    tensors: int
    changed: int
    size: int
    alpha_by_group: Mapping[str, float]
    tensors_by_group: Mapping[str, int]
    left_out: tuple[str, ...]


def merge_checkpoints(
    base: Path,
    finetuned: Path | Sequence[Path],
    out: Path,
    *,
    method: str = "linear",
    alpha: float = 0.8,
    alpha_by_group: Mapping[str, float] | None = None,
    groups: Mapping[str, str] = DEFAULT_GROUPS,
    extrapolate: bool = False,
    density: float = 0.2,
    drop: float = 0.9,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> MergeReport:
    """Merge fine-tuned checkpoints into the base they came from and write the result to the new folder `out`.

    Args:
        base: pretrained model, a folder or a safetensors file; configuration, processor and statistics are copied.
        finetuned: model fine-tuned from it, or several for "task_arithmetic", "ties" and "dare". A PEFT LoRA folder,
            or a folder with one called `adapter` in it, stands for the base with that adapter merged in.
        out: must not exist; it appears when the merge is complete.
        method: "linear", "slerp", "task_arithmetic", "ties" or "dare"; the modules of these names say what they do.
        alpha: weight of what the fine-tuning changed, in [0, 1].
        alpha_by_group: for parameter groups that differ, for example {"vision": 1.0}.
        groups: name prefix -> group, see `groups.group_of`.
        extrapolate: allow any finite alpha.
        density: fraction that TIES keeps, in (0, 1].
        drop: fraction that DARE drops, in [0, 1).
        seed: of the masks of DARE.
        on_progress: called after every block.

    Raises:
        PerennialError: the models differ in names or shapes, a coefficient is out of range, a group has no tensors,
            `out` exists, the disk is too small, an input is damaged, or a merged weight is not finite.
    """
    require_new(out)
    models = _open(base, [finetuned] if isinstance(finetuned, Path) else finetuned)
    parts = {"": models} | _modules_beside(models)
    _require_own_base(parts)
    names = [_full(module, name) for module, (first, *_) in parts.items() for name in first.entries]
    alphas = coefficients(names, alpha, alpha_by_group or {}, groups, extrapolate=extrapolate)
    settings = Settings({}, len(models) - 1, density, drop, seed)
    copied, left_out = _companions(models[0])
    require_space(out, sum(map(_size, copied)) + sum(_size(file) for part in parts.values() for file in part[0].files))
    with whole_folder(out) as folder:
        _copy(copied, folder)
        changed, hashes = _write(parts, method, settings, alphas, folder, on_progress or (lambda done, total: None))
        report = _report(out, models[0], alphas, groups, changed, left_out)
        record = _provenance(report, models, hashes, method, settings)
        (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return report


def _write(
    parts: Mapping[str, Sequence[Model]],
    method: str,
    settings: Settings,
    alphas: Mapping[str, float],
    folder: Path,
    on_progress: Progress,
) -> tuple[int, list[dict[str, str]]]:
    """Merge every part into `folder`: the number of tensors that differ, and each model's hashes of its files."""
    changed, hashes = 0, [dict[str, str]() for _ in parts[""]]
    for module, models in parts.items():
        own = {name: alphas[_full(module, name)] for name in models[0].entries}
        with Merge(models, method, replace(settings, alpha=_mergeable(own, models)), own) as merge:
            found = merge.write(folder, on_progress if not module else lambda done, total: None)
        changed += len(merge.changed)
        hashes = [before | new for before, new in zip(hashes, found, strict=True)]
    return changed, hashes


def _full(module: str, name: str) -> str:
    """The name of a tensor in the whole model; the modules in files of their own leave their own name out."""
    return f"{module}.{name}" if module else name


def _mergeable(alphas: Mapping[str, float], models: Sequence[Model]) -> dict[str, float]:
    """The coefficients of tensors that are numbers in all models."""
    return {name: a for name, a in alphas.items() if all(m.entries[name].dtype in DTYPES for m in models)}


def _report(
    out: Path,
    base: Model,
    alphas: Mapping[str, float],
    groups: Mapping[str, str],
    changed: int,
    left_out: tuple[str, ...],
) -> MergeReport:
    of_name = {name: group_of(name, groups) for name in alphas}
    return MergeReport(
        out,
        tensors=len(of_name),
        changed=changed,
        size=sum(map(_size, base.files)),
        alpha_by_group={group: alphas[name] for name, group in of_name.items()},
        tensors_by_group=dict(Counter(of_name.values())),
        left_out=left_out,
    )


def _open(base: Path, finetuned: Sequence[Path]) -> list[Model]:
    if is_adapter(base):
        raise PerennialError(f"{base} is an adapter, not a model; `merge_adapters` merges adapters with each other.")
    first = open_checkpoint(base)
    models: list[Model] = [first]
    beside = _named_files(base)
    for path in map(learned, finetuned):
        model = AdaptedCheckpoint(first, open_adapter(path), beside) if is_adapter(path) else open_checkpoint(path)
        require_same_tensors(_shapes(first), _shapes(model), f"model {path}")
        models.append(model)
    return models


def _modules_beside(models: Sequence[Model]) -> dict[str, list[Model]]:
    """Modules that OpenVLA-OFT publishes in files of their own, `<module>--<step>_checkpoint.safetensors`, by name.

    Raises:
        PerennialError: one model has such a file and another has none, or an adapter does not fit the base's.
    """
    found: dict[str, list[Model]] = {}
    of_model = [
        _named_files(models[0].path if isinstance(model, AdaptedCheckpoint) else model.path) for model in models
    ]
    for module in dict.fromkeys(name for files in of_model for name in files):
        for model, files in zip(models, of_model, strict=True):
            if module not in files:
                raise PerennialError(
                    f"{model.path} has no file {module}--*.safetensors, but another of the models has; copy it there, "
                    "or convert its pickle by `perennial convert`."
                )
            own = open_checkpoint(files[module])
            found.setdefault(module, []).append(
                AdaptedCheckpoint(own, model.adapter, files, module) if isinstance(model, AdaptedCheckpoint) else own
            )
        for part in found[module][1:]:
            require_same_tensors(_shapes(found[module][0]), _shapes(part), f"model {part.path}")
    return found


def _require_own_base(parts: Mapping[str, Sequence[Model]]) -> None:
    """Check that adapters were trained on this base."""
    for of_model in zip(*parts.values(), strict=True):
        adapted = {m: part for m, part in zip(parts, of_model, strict=True) if isinstance(part, AdaptedCheckpoint)}
        if adapted:
            samples = {_full(m, name): n for m, part in adapted.items() for name, n in part.samples().items()}
            adapted[""].adapter.require_base(samples, parts[""][0].path)


def _named_files(folder: Path) -> dict[str, Path]:
    """The file of each module that has one of its own."""
    return {path.name.partition("--")[0]: path for path in sorted(folder.glob("*--*.safetensors"))}


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in model.entries.items()}


def _companions(model: Model) -> tuple[list[Path], tuple[str, ...]]:
    """What lies beside the weights: files and folders to copy, and names of weights in other formats to leave out."""
    if model.path.is_file():
        return [], ()
    written = {*model.files, *_named_files(model.path).values(), *(model.path / name for name in ABOUT_THE_BASE)}
    beside = [p for p in sorted(model.path.iterdir()) if p not in written and not p.name.startswith(".")]
    left_out = tuple(path.name for path in beside if path.suffix in OTHER_WEIGHTS)
    return [p for p in beside if p.name not in left_out], left_out


def _copy(paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def _provenance(
    report: MergeReport, models: Sequence[Model], hashes: list[dict[str, str]], method: str, settings: Settings
) -> dict[str, Any]:
    """What was merged how; the provenance of an input that is itself a merge is kept inside."""
    needed = {"ties": {"density": settings.density}, "dare": {"drop": settings.drop, "seed": settings.seed}}
    origins = [
        {"path": str(model.path), "sha256": found} | _earlier(model.path)
        for model, found in zip(models, hashes, strict=True)
    ]
    return {
        "perennial": perennial.__version__,
        "method": method,
        **needed.get(method, {}),
        "alpha_by_group": report.alpha_by_group,
        "tensors_by_group": report.tensors_by_group,
        "changed_tensors": report.changed,
        "base": origins[0],
        "finetuned": origins[1:],
    }


def _earlier(path: Path) -> dict[str, Any]:
    record = path / PROVENANCE
    return {"provenance": json.loads(record.read_text(encoding="utf-8"))} if record.is_file() else {}
