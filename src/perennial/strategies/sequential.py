"""Sequential fine-tuning, the simple recipe (arXiv 2603.11653): learn the next task and do nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from perennial.strategies.base import Strategy


@dataclass
class Sequential(Strategy):
    """One adapter, carried on from task to task."""

    name: ClassVar[str] = "sequential"
