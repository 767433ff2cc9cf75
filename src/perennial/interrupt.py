"""Ctrl-C in two stages: the first finishes and commits what is under way, the second stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

from perennial.errors import PerennialError


class InterruptedRunError(PerennialError):
    """The run was asked to stop and has committed its state."""

    exit_code = 130


class TwoStageInterrupt:
    """While this context is active, the first SIGINT or SIGTERM only sets `requested`; the second one interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._answer)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not `print`: a handler may interrupt another print in the middle.
        os.write(2, b"\nFinishing the present step, then stopping. Press Ctrl-C again to stop at once.\n")
