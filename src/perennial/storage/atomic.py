"""Atomic writes: after a power cut there is either the old file or folder, or the new one, never half of one.

A file or folder is written beside its final place, as `.NAME.new.PID.partial`, flushed to the disk and renamed.
A committed folder has a `manifest.json` with the size and SHA-256 of each of its files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from perennial import faults
from perennial.errors import PerennialError

MANIFEST = "manifest.json"
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|former)\.\d+\.partial")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically; its folder is made where needed.

    Raises:
        PerennialError: the disk is full or the folder cannot be written; an older file at `path` stays as it was.
    """
    partial = _partial(path)
    with explained(path), _removed_on_failure(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; NaN and infinity raise `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def commit_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `final` appear at once with everything that `write(folder)` puts into the folder it is given.

    A folder that is already there is replaced.

    Raises:
        PerennialError: the disk is full or the place cannot be written; an older folder `final` stays as it was.
    """
    partial, former = _partial(final), _partial(final, "former")
    with explained(final), _removed_on_failure(partial):
        partial.mkdir(parents=True)
        write(partial)
        faults.point("save")
        _write_manifest(partial)
        faults.point("rename")
        if final.exists():
            final.rename(former)
        partial.rename(final)
        fsync(final.parent)
        _remove(former)


def verify(folder: Path) -> None:
    """Check a committed folder against its manifest; files that the manifest does not list are nobody's business.

    Raises:
        PerennialError: it names the first file that is missing or whose size or SHA-256 differs.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_bytes())["files"]
        records = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in expected.items()]
    except FileNotFoundError:
        raise PerennialError(f"{folder / MANIFEST} is missing, so {folder} is not a complete commit.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise PerennialError(f"{folder / MANIFEST} is damaged; restore {folder} from a copy or delete it.") from None
    for path, size, digest in records:
        advice = f"restore it from a copy or delete {folder}"
        if not path.is_file():
            raise PerennialError(f"{path} is missing; {advice}.")
        if path.stat().st_size != size:
            raise PerennialError(f"{path} is damaged: {path.stat().st_size} bytes where {size} were written; {advice}.")
        if sha256(path) != digest:
            raise PerennialError(f"{path} is damaged: its SHA-256 is not the one in its manifest; {advice}.")


def clean(root: Path) -> None:
    """Remove what interrupted writes left anywhere below `root`; only safe while nothing writes there.

    A folder that was moved aside to be replaced, and whose replacement never came, is moved back.
    """
    with explained(root):
        for leftover in list(root.rglob(".*.partial")):
            parts = PARTIAL.fullmatch(leftover.name)
            if parts and parts["kind"] == "former" and not leftover.with_name(parts["name"]).exists():
                leftover.rename(leftover.with_name(parts["name"]))
            elif parts:
                _remove(leftover)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a sentence that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _os_error(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            reason = f"The disk is full, so {path} could not be written; free some space there"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"{path} cannot be written ({os.strerror(code)}); make its folder writable or choose another one"
        else:
            reason = f"{path} could not be written ({error}); check the disk"
        raise PerennialError(f"{reason} and try again: everything committed earlier is intact.") from error


def _write_manifest(folder: Path) -> None:
    """Add the manifest of `folder` and flush all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def _partial(path: Path, kind: str = "new") -> Path:
    """Where `path` lives while it is not complete."""
    return path.with_name(f".{path.name}.{kind}.{os.getpid()}.partial")


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    """Start without `partial`, and give its space back if the block fails."""
    _remove(partial)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def _os_error(error: SafetensorError) -> int | None:
    """The errno that safetensors hides in its message."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
