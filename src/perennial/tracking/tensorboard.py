"""TensorBoard event files in RUN/tensorboard, read with `tensorboard --logdir RUN`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from perennial.errors import not_installed
from perennial.tracking.base import Tracker


class TensorBoard(Tracker):
    """Scalars only. A step that is logged again after a resume replaces the earlier one in TensorBoard's display."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Start an event file in `folder`/tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed("TensorBoard, which the tracker 'tensorboard' needs,", "tensorboard", error) from error
        return cls(SummaryWriter(str(folder / "tensorboard")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record each value as a scalar; TensorBoard keeps single precision."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
