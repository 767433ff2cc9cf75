"""What a tracker does: it takes named numbers, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self


class Tracker(ABC):
    """Mirrors the numbers of one run. A run is never decided by its trackers: nothing is read back from them."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def open(cls, folder: Path) -> Self:
        """Track the run in `folder`; a resumed run opens it again and goes on.

        Raises:
            PerennialError: the library behind the tracker is not installed; the sentence names the extra.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`, counted from 0 over the whole run."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still in memory."""
