"""Merges safetensors checkpoints of any size on disk.

The models are read, merged, hashed and written block by block, so memory does not grow with them. The result has the
layout of the base: the same files, names, types and order, with its configuration, tokenizer and statistics beside.
Hashing the inputs runs in threads of its own; the disk starts to write while the next blocks are computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import perennial
from perennial import faults
from perennial.errors import PerennialError
from perennial.merging.block_methods import BlockMerge, Settings, prepare
from perennial.merging.folders import require_new, require_space, whole_folder
from perennial.merging.groups import DEFAULT_GROUPS, coefficients, group_of
from perennial.merging.state_dicts import accumulator, refuse_quantised, require_same_tensors, unchanged
from perennial.merging.tensor_files import DTYPES, Checkpoint, Reader, open_checkpoint

PROVENANCE = "merge_provenance.json"
OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf"})
"""Weights in formats that are not merged: a copy of the base's would be mistaken for the merged model's."""
WRITEBACK = 64 << 20
"""Bytes after which the disk is told to start writing."""

Progress = Callable[[int, int], None]
"""Called with bytes merged so far and in all."""


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
        base: pretrained model, a folder or a safetensors file; everything but the weights is copied from it.
        finetuned: model fine-tuned from it, or several for "task_arithmetic", "ties" and "dare".
        out: must not exist; it appears when the merge is complete.
        method: "linear", "slerp", "task_arithmetic", "ties" or "dare"; the modules of these names say what they do.
        alpha: weight of what the fine-tuning changed, in [0, 1].
        alpha_by_group: for parameter groups that differ, for example {"vision": 1.0}.
        groups: name prefix -> group, see `groups.group_of`.
        extrapolate: allow any finite alpha.
        density: fraction that TIES keeps, in (0, 1].
        drop: fraction that DARE drops, in [0, 1).
        seed: of the masks of DARE.
        on_progress: called after every tensor.

    Raises:
        PerennialError: the models differ in names or shapes, a coefficient is out of range, a group has no tensors,
            `out` exists, the disk is too small, an input is damaged, or a merged weight is not finite.
    """
    require_new(out)
    several = [finetuned] if isinstance(finetuned, Path) else list(finetuned)
    models = [open_checkpoint(path) for path in (base, *several)]
    for model in models[1:]:
        require_same_tensors(_shapes(models[0]), _shapes(model), f"model {model.path}")
    names = models[0].entries
    alphas = coefficients(names, alpha, alpha_by_group or {}, groups, extrapolate=extrapolate)
    mergeable = {name: a for name, a in alphas.items() if all(m.entries[name].dtype in DTYPES for m in models)}
    settings = Settings(mergeable, len(several), density, drop, seed)
    copied, left_out = _companions(models[0])
    require_space(out, models[0].size + sum(map(_size, copied)))
    with Merge(models, method, settings, alphas) as merge, whole_folder(out) as folder:
        for path in copied:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        hashes = merge.write(folder, on_progress or (lambda done, total: None))
        of_name = {name: group_of(name, groups) for name in names}
        report = MergeReport(
            out,
            tensors=len(names),
            changed=len(merge.changed),
            size=models[0].size,
            alpha_by_group={group: alphas[name] for name, group in of_name.items()},
            tensors_by_group=dict(Counter(of_name.values())),
            left_out=left_out,
        )
        record = _provenance(report, models, hashes, method, settings)
        (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return report


class Merge:
    """The work itself: goes through the base's files in order and writes the merged ones. Use it in a `with`.

    Attributes:
        changed: names of the tensors, seen so far, that differ between the models.
    """

    def __init__(
        self, models: Sequence[Checkpoint], method: str, settings: Settings, alphas: Mapping[str, float]
    ) -> None:
        self.models = models
        self.alphas = alphas
        self.changed: set[str] = set()
        self._readers = [Reader(model) for model in models]
        self._stop = threading.Event()
        self._hashers = ThreadPoolExecutor(len(models))
        self._of_tensor = prepare(method, settings, self._blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._hashers.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def write(self, folder: Path, on_progress: Progress) -> list[dict[str, str]]:
        """Write the merged files into `folder`.

        Returns:
            SHA-256 by file name of every model's files, and last of the merged ones.
        """
        pending: list[dict[str, Future[str]]] = [{} for _ in self.models]
        merged: dict[str, str] = {}
        done, total = 0, self.models[0].size
        rounds = max(len(model.files) for model in self.models)
        for number in range(rounds):
            for model, futures in zip(self.models, pending, strict=True):
                for file in model.files[number : number + 1]:  # in step with the merge, so it is read once from disk
                    futures[file.name] = self._hashers.submit(_sha256, file, self._stop)
            for file in self.models[0].files[number : number + 1]:
                sink = _Sink(folder / file.name)
                for piece in self._file(file):
                    sink.write(piece)
                    on_progress(done + sink.size, total)
                    faults.point("merge_block")
                merged[file.name] = sink.close()
                done += sink.size
        return [{name: future.result() for name, future in futures.items()} for futures in pending] + [merged]

    def _file(self, file: Path) -> Iterator[memoryview]:
        """The bytes of a merged file: the base's header, then every block."""
        yield memoryview(self.models[0].headers[file])
        for name, entry in self.models[0].entries.items():
            if entry.file == file:
                for tensor in self._tensor(name):
                    yield memoryview(tensor.view(torch.uint8).numpy())

    def _tensor(self, name: str) -> Iterator[Tensor]:
        """The merged blocks of a tensor; blocks that are the same in all models stay bit for bit."""
        kinds = {model.entries[name].dtype for model in self.models}
        merge = self._of_tensor(name) if kinds <= DTYPES.keys() else self._take(name, kinds)
        for number, tensors in enumerate(self._blocks(name)):
            if unchanged(tensors):
                yield tensors[0]
            else:
                self.changed.add(name)
                block = merge(number, tensors)
                _require_finite(name, block)
                yield block

    def _take(self, name: str, kinds: set[str]) -> BlockMerge:
        """Integers are not averaged: they are taken from one model where that is meant, and refused otherwise."""
        if len(kinds) == 1 and self.alphas[name] == 1 and len(self.models) == 2:
            return lambda _, tensors: tensors[1]
        if len(kinds) == 1 and (self.alphas[name] == 0 or self.models[0].entries[name].shape == ()):
            return lambda _, tensors: tensors[0]

        def refuse(number: int, tensors: list[Tensor]) -> Tensor:
            raise refuse_quantised(name, " and ".join(sorted(kinds)))

        return refuse

    def _blocks(self, name: str) -> Iterator[list[Tensor]]:
        for number in range(self.models[0].entries[name].blocks):
            yield [reader.block(name, number) for reader in self._readers]


class _Sink:
    """A new file, hashed as it is written and sent to the disk early, so that the final fsync has little to do."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._sent = 0
        self.size = 0

    def write(self, piece: memoryview) -> None:
        self._stream.write(piece)
        self._digest.update(piece)
        self.size += len(piece)
        if self.size - self._sent >= WRITEBACK and hasattr(os, "posix_fadvise"):
            # On Linux this starts to write dirty pages back without waiting for them.
            os.posix_fadvise(self._stream.fileno(), self._sent, self.size - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self.size

    def close(self) -> str:
        self._stream.close()
        return self._digest.hexdigest()


def _sha256(file: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as stream:
        while (size := stream.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:size])
    return digest.hexdigest()


def _require_finite(name: str, block: Tensor) -> None:
    # The sum is a quick look: it is finite unless an element is not, or in rare cases of overflow.
    if not math.isfinite(block.sum(dtype=accumulator(block)).item()) and not bool(block.isfinite().all()):
        raise PerennialError(f"{name} is infinite or NaN after merging; look for NaN in the models, or reduce alpha.")


def _shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in model.entries.items()}


def _companions(model: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """What lies beside the weights: files and folders to copy, and names of weights in other formats to leave out."""
    if model.path.is_file():
        return [], ()
    beside = [p for p in sorted(model.path.iterdir()) if p not in model.headers and not p.name.startswith(".")]
    left_out = tuple(path.name for path in beside if path.suffix in OTHER_WEIGHTS)
    return [p for p in beside if p.name not in left_out and p.name != PROVENANCE], left_out


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def _provenance(
    report: MergeReport, models: Sequence[Checkpoint], hashes: list[dict[str, str]], method: str, settings: Settings
) -> dict[str, Any]:
    """What was merged how; the provenance of an input that is itself a merge is kept inside."""
    needed = {"ties": {"density": settings.density}, "dare": {"drop": settings.drop, "seed": settings.seed}}
    origins = [
        {"path": str(model.path), "sha256": found} | _earlier(model.path)
        for model, found in zip(models, hashes[:-1], strict=True)
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
        "merged": {"sha256": hashes[-1]},
    }


def _earlier(path: Path) -> dict[str, Any]:
    record = path / PROVENANCE
    return {"provenance": json.loads(record.read_text(encoding="utf-8"))} if record.is_file() else {}
