"""A strategy in a module that no room lists."""

from dataclasses import dataclass
from typing import ClassVar

from perennial.strategies.base import Strategy


@dataclass
class Needy(Strategy):
    name: ClassVar[str] = "needy"
    strength: float = 1.0

    def requires(self) -> frozenset[str]:
        return frozenset({"logits"})
