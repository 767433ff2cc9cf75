"""Reading a safetensors checkpoint of any layout block by block, in constant memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from perennial.conversion import PICKLED
from perennial.errors import PerennialError
from perennial.merging.state_dicts import BLOCK

INDEX = ".safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that can be merged; all others are read as bytes."""

SHOWN = 10
"""Names that a sentence lists."""

BUFFERS = 4
"""Blocks of a model that may wait to be hashed."""

NOTHING: Future[None] = Future()
NOTHING.set_result(None)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: that holds it.
        dtype: in the words of safetensors, for example "BF16".
        shape: of the tensor.
        start, stop: byte offsets in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def type(self) -> torch.dtype:
        """The torch type, uint8 for what cannot be merged."""
        return DTYPES.get(self.dtype, torch.uint8)

    @property
    def blocks(self) -> int:
        """How many blocks of at most `BLOCK` elements of `type` the tensor has."""
        return math.ceil((self.stop - self.start) / (BLOCK * self.type.itemsize))


class BlockReader(Protocol):
    """Reads the blocks of a model's tensors."""

    def block(self, name: str, number: int) -> Tensor:
        """Elements [number * BLOCK, (number + 1) * BLOCK) of the flattened tensor, valid until the next call."""
        ...

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of each file; what was not read yet is read now."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class Model(Protocol):
    """What is merged.

    Attributes:
        path: the folder, or the single file that was asked for.
        files: the safetensors files.
        entries: tensor name -> where it lies, by file and offset.
    """

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def files(self) -> tuple[Path, ...]: ...  # noqa: D102

    @property
    def entries(self) -> Mapping[str, Entry]: ...  # noqa: D102

    def reader(self) -> BlockReader:
        """Open the files."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A `Model` that lies on disk tensor by tensor."""

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]

    def reader(self) -> BlockReader:
        """Open the files."""
        return _Reader(self, hashing=True)

    def plain_reader(self) -> BlockReader:
        """Open the files to read them without hashing on the way."""
        return _Reader(self, hashing=False)

    def numbers(self, name: str, spans: Sequence[tuple[int, int]]) -> Tensor:
        """The elements [start, stop) of the flattened tensor, span after span, without reading the others."""
        entry, found = self.entries[name], bytearray()
        size = entry.type.itemsize
        with entry.file.open("rb") as stream:
            for start, stop in spans:
                stream.seek(entry.start + start * size)
                found += stream.read((stop - start) * size)
        return torch.frombuffer(found, dtype=entry.type)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of the checkpoint at `path`.

    Args:
        path: a safetensors file, or a folder with `*.safetensors.index.json`, `model.safetensors` or one other
            safetensors file.

    Raises:
        PerennialError: nothing is there, a file is truncated or is no safetensors file, or the index does not fit.
    """
    files, index = _weight_files(path)
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(file)[1]
    if index is not None:
        places = {name: entry.file.name for name, entry in entries.items()}
        wrong = sorted(name for name in places.keys() | index.keys() if places.get(name) != index.get(name))
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise PerennialError(
                f"The index of {path} does not name the tensors of its files, among them "
                f"{', '.join(wrong[:SHOWN])}{more}; copy the checkpoint again."
            )
    return Checkpoint(path, tuple(files), entries)


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    if path.is_file():
        return [path], None
    for index in sorted(path.glob("*" + INDEX)):
        try:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [path / name for name in sorted(set(names.values())) if Path(name).name == name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PerennialError(f"{index} is no index of a checkpoint ({error!r}); copy it again.") from error
        return files, names
    single = path / "model.safetensors"
    found = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not found:
        refuse_pickles(path)
    if len(found) != 1:
        what = "no safetensors checkpoint" if not found else f"{len(found)} safetensors files and no index"
        raise PerennialError(f"There is {what} in {path}; give the folder of a model, or the file itself.")
    return found, None


def refuse_pickles(folder: Path) -> None:
    """See that a folder without safetensors files has no other weights either.

    Raises:
        PerennialError: it has pickled ones, which can hide code.
    """
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED) if folder.is_dir() else []
    if pickled:
        raise PerennialError(
            f"The weights in {folder} are pickled ({', '.join(pickled[:3])}), which can hide code and is not opened "
            f"here; convert them by `perennial convert {folder}`."
        )


def read_header(file: Path) -> tuple[bytes, dict[str, Entry]]:
    """The bytes before the data and the tensors by offset, checked to cover exactly the rest of the file.

    Raises:
        PerennialError: the file cannot be read, is truncated or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if length > size - 8:
                raise ValueError(f"it ends after {size} bytes")
            text = stream.read(length)
        start = 8 + length
        entries = {
            name: Entry(
                file,
                info["dtype"],
                tuple(info["shape"]),
                start + info["data_offsets"][0],
                start + info["data_offsets"][1],
            )
            for name, info in json.loads(text).items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise PerennialError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PerennialError(f"{file} is truncated or no safetensors file ({error}); copy it again.") from error
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, entry in ordered.items():
        itemsize = entry.type.itemsize if entry.dtype in DTYPES else None
        wrong = itemsize and math.prod(entry.shape) * itemsize != entry.stop - entry.start
        if entry.start != start or entry.stop < start or wrong:
            raise PerennialError(f"{file} is damaged at the tensor {name}; copy it again.")
        start = entry.stop
    if start != size:
        raise PerennialError(
            f"{file} has {size} bytes instead of {start}; it is truncated or has bytes to spare, copy it again."
        )
    return prefix + text, ordered


class _Reader:
    """Hashes each file in a thread as far as it happens to be read in order, so that bytes are read only once."""

    def __init__(self, checkpoint: Checkpoint, hashing: bool) -> None:
        self._entries = checkpoint.entries
        self._files = {file: _HashedFile(file) for file in checkpoint.files}
        self._hashing = hashing
        self._hasher = ThreadPoolExecutor(1)
        self._buffers = deque((torch.empty(BLOCK * 8, dtype=torch.uint8), NOTHING) for _ in range(BUFFERS))

    def block(self, name: str, number: int) -> Tensor:
        entry = self._entries[name]
        step = BLOCK * entry.type.itemsize
        start = entry.start + number * step
        size = min(step, entry.stop - start)
        file = self._files[entry.file]
        buffer, in_use = self._buffers.popleft()
        in_use.result()
        view = buffer.numpy().data[:size]
        file.read(start, view)
        if self._hashing and start == file.hashed:
            file.hashed += size
            in_use = self._hasher.submit(file.digest.update, view)
        self._buffers.append((buffer, in_use))
        return buffer[:size].view(entry.type)

    def hashes(self) -> dict[str, str]:
        for _, in_use in self._buffers:
            in_use.result()
        return {file.path.name: file.finish() for file in self._files.values()}

    def close(self) -> None:
        self._hasher.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.stream.close()


class _HashedFile:
    """A file and the hash of its first `hashed` bytes."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)[0]
        self.path = path
        self.stream = path.open("rb", buffering=0)
        self.digest = hashlib.sha256(header)
        self.hashed = len(header)

    def read(self, start: int, view: memoryview) -> None:
        self.stream.seek(start)
        if self.stream.readinto(view) != len(view):
            raise PerennialError(f"{self.path} has changed while it was read; merge again.")

    def finish(self) -> str:
        """The SHA-256 of the whole file."""
        self.stream.seek(self.hashed)
        while rest := self.stream.read(BLOCK):
            self.digest.update(rest)
        return self.digest.hexdigest()
