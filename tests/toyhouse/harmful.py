"""A strategy that spoils the weights after one task, as a bad update would."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from perennial.randomness import stream
from perennial.strategies.base import Strategy


@dataclass
class Harmful(Strategy):
    name: ClassVar[str] = "harmful"
    after: str = "right"
    strength: float = 1.0

    @torch.no_grad()
    def after_task(self, task, policy, collect):
        if task.name == self.after:
            for name, parameter in policy.trainable().items():
                noise = stream(0, "harm", name).normal(0.0, self.strength, tuple(parameter.shape))
                parameter += torch.from_numpy(noise).to(parameter.dtype)
