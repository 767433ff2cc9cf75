"""Append-only files of JSON lines that an interrupted run can rewind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.errors import PerennialError
from perennial.storage.atomic import explained, fsync


@dataclass(frozen=True)
class JsonLines:
    """One log file; a line that was cut off while it was written does not exist."""

    path: Path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object and flush it to the disk.

        Raises:
            PerennialError: a number is NaN or infinite, or the disk does not take the line.
        """
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            raise PerennialError(f"A number for {self.path} is NaN or infinite: {dict(row)}.") from error
        with explained(self.path):
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                fsync(self.path.parent)

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines.

        Raises:
            PerennialError: a line is no JSON.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise PerennialError(f"{self.path} is damaged in line {number}; restore it from a copy.") from None
        return rows

    def size(self) -> int:
        """Length in bytes; 0 if there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Forget everything after the first `size` bytes.

        Raises:
            PerennialError: the file is shorter than that.
        """
        if self.size() < size:
            raise PerennialError(
                f"{self.path} has {self.size()} bytes, but the last commit was made when it had {size}; "
                "restore it from a copy."
            )
        if self.path.exists():
            with explained(self.path), self.path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
