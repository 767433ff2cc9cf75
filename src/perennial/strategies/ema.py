"""Weight averaging: what is kept of a task is the moving average of the weights that its training went through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.strategies._weights import prefixed, restore, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class EMA(Strategy):
    """average <- decay * average + (1 - decay) * theta after every optimiser step; it replaces theta after the task.

    The average begins with the weights that the task starts from, in float32: in bfloat16 the steps of a decay near 1
    round to nothing. With an adapter its factors are averaged, which stay close to each other within a task. The code
    of RETAIN (arXiv 2512.08333) trains with 0.99 and merges the average, as `ema,merge` does.

    Attributes:
        decay: in [0, 1); 0 keeps the last weights.
    """

    name: ClassVar[str] = "ema"
    decay: float = 0.99
    average: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise PerennialError(f"ema.decay is {self.decay}; it must be at least 0 and below 1.")

    def unfit(self, before: Sequence[Strategy], after: Sequence[Strategy]) -> str | None:
        """The average knows nothing of what others made of the task."""
        undone = [other.name for other in before if other.revises()]
        return f"it would replace what {undone[0]!r} makes of a task; list it before {undone[0]!r}" if undone else None

    def before_task(self, task: Task, policy: Policy) -> None:
        """Begin with the weights that the task starts from."""
        self.average = {name: weights.float() for name, weights in snapshot(policy).items()}

    @torch.no_grad()
    def after_step(self, policy: Policy) -> None:
        """Average in the new weights; those that a stage freezes stay as they are."""
        for name, parameter in policy.trainable().items():
            self.average[name].lerp_(parameter.float(), 1 - self.decay)

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Go on from the average."""
        restore(policy, self.average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average."""
        return prefixed("average", self.average)

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore the average."""
        self.average = unprefixed("average", state, policy.device)
