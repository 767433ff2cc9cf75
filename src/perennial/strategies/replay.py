"""Experience replay: own successes in earlier tasks, or their demonstrations, are imitated beside every update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from perennial.demonstrations import dataset
from perennial.demonstrations.dataset import absolute, load, recorded, require_recorded
from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.randomness import stream
from perennial.rollout import trajectory
from perennial.strategies._memory import draw, from_tensors, row_bytes, to_tensors
from perennial.strategies._weights import nested, prefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class Replay(Strategy):
    """loss + coefficient * imitation loss of decisions kept from earlier tasks (ER).

    When a task has been learned, `episodes` are played and up to `capacity` decisions of the successful ones are
    kept, a uniform random subset; or of the task's demonstrations, where there is a folder of them. A task without any
    success leaves nothing to replay.

    `variant="ut2026"` is the memory of the code of arXiv 2603.11653: from the first task on the first demonstration of
    every task in the folder, of later and held-out ones too.

    Attributes:
        coefficient: at least 0; none is 0.1, which suits the small policy, and for `ut2026` that code's 0.03.
        ratio: replayed rows per row of an update, in (0, 1].
        capacity: decisions kept per task.
        episodes: played after every task, where there are no demonstrations.
        demonstrations: folder that `perennial demos` wrote, with all trained tasks in it; "" replays own successes.
    """

    name: ClassVar[str] = "replay"
    coefficient: float | None = None
    ratio: float = 1.0
    capacity: int = 256
    episodes: int = 32
    demonstrations: str = ""
    variant: Literal["textbook", "ut2026"] = "textbook"
    memories: dict[str, Batch] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise PerennialError(f"{self.name}.coefficient is {self.strength}; it must be at least 0.")
        if not 0 < self.ratio <= 1:
            raise PerennialError(f"{self.name}.ratio is {self.ratio}; it must be above 0 and at most 1.")
        if min(self.capacity, self.episodes) < 1:
            raise PerennialError(f"{self.name}.capacity and {self.name}.episodes must be at least 1.")

    @property
    def strength(self) -> float:
        """The coefficient given, or that of the variant."""
        default = 0.03 if self.variant == "ut2026" else 0.1
        return default if self.coefficient is None else self.coefficient

    def unjoined(self) -> str | None:
        """Only what is remembered from the start can be replayed."""
        from_start = self.variant == "ut2026" and self.demonstrations
        return None if from_start else "it replays earlier tasks, of which there are none"

    def check(self, tasks: Sequence[str]) -> None:
        """Every task has been demonstrated, where demonstrations are replayed."""
        for task in tasks if self.demonstrations or self.variant == "ut2026" else ():
            require_recorded(self.demonstrations, f"strategies.{self.name}.demonstrations", task)

    def settled(self) -> Self:
        """The same strategy, with the folder of demonstrations as an absolute path."""
        return replace(self, demonstrations=absolute(self.demonstrations))

    def kept(self, task: Task, policy: Policy) -> dict[torch.device, int]:
        """`capacity` decisions, or as many as the episodes can have."""
        played = self.episodes * math.ceil(task.horizon / policy.chunk_steps)
        decisions = self.capacity if self.demonstrations else min(self.capacity, played)
        return {torch.device("cpu"): decisions * row_bytes(policy, policy.bins if "logits" in self.requires() else 0)}

    def before_task(self, task: Task, policy: Policy) -> None:
        """For `ut2026` keep the first demonstration of every task, once."""
        if self.variant == "ut2026" and self.demonstrations and not self.memories:
            folder = Path(self.demonstrations)
            for name in recorded(folder):
                self._keep(name, dataset.to_batch(load(folder, [name])[:1], policy), policy)

    def replay(self, rng: np.random.Generator, size: int) -> Batch | None:
        """`ratio` x `size` kept decisions."""
        rows = round(self.ratio * size)
        if not self.memories or rows == 0 or not self.coefficients():
            return None
        return draw([self.memories[task] for task in sorted(self.memories)], rng, rows)

    def coefficients(self) -> float:
        """Sum of the weights of what is replayed; with 0 nothing is drawn."""
        return self.strength

    def replay_loss(self, outputs: Outputs, whole: Batch) -> Tensor:
        """The imitation loss, weighted."""
        return self.strength * outputs.imitation_loss.sum() / len(whole)

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep decisions of fresh successful episodes, or of demonstrations."""
        if self.demonstrations and self.variant == "ut2026":
            return
        self.memories.pop(task.name, None)
        if self.demonstrations:
            self._keep(task.name, dataset.to_batch(load(Path(self.demonstrations), [task.name]), policy), policy)
        elif successes := [played for played in collect(self.episodes) if played.success]:
            self._keep(task.name, trajectory.to_batch(successes, policy.token_steps), policy)

    def _keep(self, task: str, decisions: Batch, policy: Policy) -> None:
        """Remember at most `capacity` of them."""
        rows = stream(0, self.name, task).permutation(len(decisions))[: self.capacity]
        self.memories[task] = self.label(policy, replace(decisions.take(rows), temperature=1.0, log_prob=None))

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
