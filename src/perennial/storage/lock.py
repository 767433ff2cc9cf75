"""One writer at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from perennial.errors import PerennialError
from perennial.storage.atomic import explained


def acquire(folder: Path) -> TextIO:
    """Lock `folder` until the returned file is closed or this process ends, however it ends.

    Raises:
        PerennialError: another process holds the lock; its number is named.
    """
    path = folder / ".lock"
    with explained(path):
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise PerennialError(
                f"Process {holder} is writing to {folder}; wait for it or stop it, then try again."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
