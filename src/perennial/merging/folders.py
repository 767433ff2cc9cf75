"""A folder that exists either whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perennial import faults
from perennial.errors import PerennialError
from perennial.storage import atomic


def require_new(out: Path) -> None:
    """Check that nothing exists at `out`.

    Raises:
        PerennialError: something does.
    """
    if out.exists() or out.is_symlink():
        raise PerennialError(f"{out} exists already; name a new folder, nothing is overwritten.")


def require_space(out: Path, size: int) -> None:
    """Check that the disk of `out` has room for `size` bytes.

    Raises:
        PerennialError: it has not.
    """
    disk = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if free < size:
        raise PerennialError(
            f"The merged model needs {size / 1e9:.2f} GB, but {disk} has only {free / 1e9:.2f} GB free; "
            "make room or choose another disk."
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` to write into, which becomes `out` once everything is on disk.

    If the body fails it is removed; what a killed process left is removed by the next attempt.

    Raises:
        PerennialError: `out` exists, or the disk refuses to write.
    """
    require_new(out)
    temporary = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            atomic.fsync(path)
        faults.point("merge_rename")
        require_new(out)
        temporary.rename(out)
        atomic.fsync(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PerennialError(f"{out} cannot be written ({error}); make room or choose another folder.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
