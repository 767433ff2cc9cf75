"""Experience replay: own successes from earlier tasks are imitated beside every update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.randomness import stream
from perennial.rollout.trajectory import to_batch
from perennial.strategies._memory import draw, from_tensors, to_tensors
from perennial.strategies._weights import nested, prefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class Replay(Strategy):
    """loss + coefficient * imitation loss of decisions kept from earlier tasks (ER).

    When a task has been learned, `episodes` are played and up to `capacity` decisions of the successful ones are
    kept, a uniform random subset. A task without any success leaves nothing to replay.

    The ratio of 1:1 is that of arXiv 2603.11653, whose coefficient is 0.03. Its code replays something else, the first
    demonstration of every task of the suite, later and held-out ones included, so there is no `ut2026` variant: no
    strategy is shown tasks that have not been taught.

    Attributes:
        coefficient: at least 0.
        ratio: replayed rows per row of an update, in (0, 1].
        capacity: decisions kept per task.
        episodes: played after every task.
    """

    name: ClassVar[str] = "replay"
    coefficient: float = 0.1
    ratio: float = 1.0
    capacity: int = 256
    episodes: int = 32
    memories: dict[str, Batch] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise PerennialError(f"{self.name}.coefficient is {self.coefficient}; it must be at least 0.")
        if not 0 < self.ratio <= 1:
            raise PerennialError(f"{self.name}.ratio is {self.ratio}; it must be above 0 and at most 1.")
        if min(self.capacity, self.episodes) < 1:
            raise PerennialError(f"{self.name}.capacity and {self.name}.episodes must be at least 1.")

    def replay(self, rng: np.random.Generator, size: int) -> Batch | None:
        """`ratio` x `size` kept decisions."""
        rows = round(self.ratio * size)
        if not self.memories or rows == 0 or not self.coefficients():
            return None
        return draw([self.memories[task] for task in sorted(self.memories)], rng, rows)

    def coefficients(self) -> float:
        """Sum of the weights of what is replayed; with 0 nothing is drawn."""
        return self.coefficient

    def replay_loss(self, outputs: Outputs, whole: Batch) -> Tensor:
        """The imitation loss, weighted."""
        return self.coefficient * outputs.imitation_loss.sum() / len(whole)

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep decisions of fresh successful episodes."""
        successes = [trajectory for trajectory in collect(self.episodes) if trajectory.success]
        self.memories.pop(task.name, None)
        if successes:
            decisions = to_batch(successes, policy.token_steps)
            rows = stream(0, self.name, task.name).permutation(len(decisions))[: self.capacity]
            self.memories[task.name] = self.label(policy, replace(decisions.take(rows), temperature=1.0, log_prob=None))

    def label(self, policy: Policy, batch: Batch) -> Batch:
        """What is kept of `batch`."""
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        """Every kept decision."""
        memories = sorted(self.memories.items())
        return {key: value for task, batch in memories for key, value in prefixed(task, to_tensors(batch)).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore the kept decisions."""
        self.memories = {task: from_tensors(tensors) for task, tensors in nested(state).items()}
