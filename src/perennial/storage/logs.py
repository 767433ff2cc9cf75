"""Append-only files of JSON lines that an interrupted run can rewind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.errors import PerennialError
from perennial.storage.atomic import explained, fsync, write_bytes


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
            PerennialError: a line is no JSON object.
        """
        return self._parse(self.path.read_bytes()) if self.path.exists() else []

    def size(self) -> int:
        """Length in bytes; 0 if there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int, keep: Callable[[Mapping[str, Any]], bool] = lambda row: False) -> None:
        """Forget the lines after the first `size` bytes, but for those to `keep`.

        Raises:
            PerennialError: the file is shorter than that, or a line is no JSON.
        """
        if self.size() < size:
            raise PerennialError(
                f"{self.path} has {self.size()} bytes, but had {size} when the latest commit was made; "
                "restore it from a copy."
            )
        if self.size() > size:
            content = self.path.read_bytes()
            kept = [json.dumps(row).encode() + b"\n" for row in self._parse(content[size:]) if keep(row)]
            write_bytes(self.path, content[:size] + b"".join(kept))

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        """The objects in all complete lines of `content`."""
        try:
            rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
        except ValueError:
            rows = [None]
        if not all(isinstance(row, dict) for row in rows):
            raise PerennialError(f"{self.path} is damaged: a line is no JSON object; restore it from a copy.")
        return rows
