"""The streaming merge: reads, merges, hashes and writes block by block, in constant memory.

The inputs are hashed and the result is written in threads of their own while the next blocks are computed. On a fast
disk the cores bound the speed: SHA-256 of both inputs takes more processor time than all else.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from perennial import faults
from perennial.errors import PerennialError
from perennial.merging.block_methods import BlockMerge, Settings, prepare
from perennial.merging.state_dicts import refuse_quantised, unchanged
from perennial.merging.tensor_files import DTYPES, Model, read_header

WRITEBACK = 16 << 20
"""Bytes after which the disk is told to start writing."""

AHEAD = 3
"""Merged blocks that may wait to be written."""

Progress = Callable[[int, int], None]
"""Called with bytes merged so far and in all."""


class Merge:
    """Goes through the base's files in order and writes the merged ones. Use it in a `with`.

    Attributes:
        models: base first.
        alphas: tensor name -> coefficient.
        changed: names of the tensors, seen so far, that differ between the models.
    """

    def __init__(self, models: Sequence[Model], method: str, settings: Settings, alphas: Mapping[str, float]) -> None:
        self.models = models
        self.alphas = alphas
        self.changed: set[str] = set()
        self._readers = [model.reader() for model in models]
        self._of_tensor = prepare(method, settings, self._blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()

    def write(self, folder: Path, on_progress: Progress) -> list[dict[str, str]]:
        """Write the merged files into `folder`.

        Returns:
            For every model the SHA-256 of its files, by name.
        """
        done, total = 0, sum(file.stat().st_size for file in self.models[0].files)
        with _one_thread():
            for file in self.models[0].files:
                with _Sink(folder / file.name) as sink:
                    for piece in self._file(file):
                        sink.write(piece)
                        done += len(piece)
                        on_progress(done, total)
                        faults.point("merge_block")
            return [reader.hashes() for reader in self._readers]

    def _file(self, file: Path) -> Iterator[memoryview]:
        """The bytes of a merged file: the base's header, then every block."""
        yield memoryview(read_header(file)[0])
        for name, entry in self.models[0].entries.items():
            if entry.file == file:
                for tensor in self._tensor(name):
                    yield tensor.view(torch.uint8).numpy().data

    def _tensor(self, name: str) -> Iterator[Tensor]:
        """The merged blocks of a tensor; blocks that are the same in all models stay bit for bit."""
        kinds = {model.entries[name].dtype for model in self.models}
        merge = self._of_tensor(name) if kinds <= DTYPES.keys() else self._take(name, kinds)
        for number, tensors in enumerate(self._blocks(name)):
            if unchanged(tensors):
                yield tensors[0].clone()  # the reader will use its memory again
            else:
                self.changed.add(name)
                block = merge(number, tensors)
                _require_finite(name, block)
                yield block

    def _take(self, name: str, kinds: set[str]) -> BlockMerge:
        """Integers are not averaged: they are taken from one model where that is meant, and refused otherwise."""
        if len(kinds) == 1 and self.alphas[name] == 1 and len(self.models) == 2:
            return lambda _, tensors: tensors[1].clone()
        if len(kinds) == 1 and (self.alphas[name] == 0 or self.models[0].entries[name].shape == ()):
            return lambda _, tensors: tensors[0].clone()

        def refuse(number: int, tensors: list[Tensor]) -> Tensor:
            raise refuse_quantised(name, " and ".join(sorted(kinds)))

        return refuse

    def _blocks(self, name: str) -> Iterator[list[Tensor]]:
        for number in range(self.models[0].entries[name].blocks):
            yield [reader.block(name, number) for reader in self._readers]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread: a block is soon averaged, and idle threads would spin on the hashers' cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Sink:
    """A new file that a thread writes; the disk starts early, so that the final fsync has little to do."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._size = self._sent = 0
        self._worker = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._worker.shutdown(cancel_futures=True)
            self._stream.close()

    def write(self, piece: memoryview) -> None:
        """Append `piece`, whose memory must stay as it is; waits while `AHEAD` pieces are not written yet."""
        self._waiting.append(self._worker.submit(self._write, piece))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def _write(self, piece: memoryview) -> None:
        self._stream.write(piece)
        self._size += len(piece)
        if self._size - self._sent >= WRITEBACK and hasattr(os, "posix_fadvise"):
            # On Linux this starts to write dirty pages back without waiting for them.
            os.posix_fadvise(self._stream.fileno(), self._sent, self._size - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._size


def _require_finite(name: str, block: Tensor) -> None:
    # The sum is a quick look: it is finite unless an element is not, or it overflows.
    if not math.isfinite(block.sum().item()) and not bool(block.isfinite().all()):
        raise PerennialError(f"{name} is infinite or NaN after merging; look for NaN in the models, or reduce alpha.")
