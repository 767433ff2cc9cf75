"""Supervised fine-tuning on demonstrations of the task at hand, alone or mixed with those that the base was made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from perennial.demonstrations.dataset import absolute, load, require_recorded, to_batch
from perennial.errors import PerennialError
from perennial.learning.base import Metrics, Objective, gradient_step
from perennial.policies.base import Batch, Outputs, Policy, concatenate
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task


@dataclass(frozen=True)
class SFT(Objective):
    """Behaviour cloning; with pretraining data mixed in, the co-fine-tuning of RETAIN (arXiv 2512.08333).

    Images and actions are normalised by the base's own statistics in both cases.

    Attributes:
        demonstrations: folder that `perennial demos` wrote, with all trained tasks in it.
        pretraining: another such folder, all of whose tasks are mixed in, in proportion to their decisions; none if "".
        target_share: expected share of the task at hand in a step, where there is pretraining data, in (0, 1].
        steps: gradient steps per iteration.
        batch_size: decisions in a step.
    """

    name: ClassVar[str] = "sft"
    demonstrations: str = "demonstrations"
    pretraining: str = ""
    target_share: float = 0.5
    steps: int = 8
    batch_size: int = 256

    def check(self, tasks: Sequence[str]) -> None:
        """Every task has been demonstrated, and the mix can be made."""
        if self.target_share > 1:
            raise PerennialError(f"--recipe.sft.target-share is {self.target_share}; it must be at most 1.")
        if self.pretraining:
            require_recorded(self.pretraining, "recipe.sft.pretraining")
        for task in tasks:
            require_recorded(self.demonstrations, "recipe.sft.demonstrations", task)

    def settled(self) -> Self:
        """The same stage, with the folders of demonstrations as absolute paths."""
        return replace(self, demonstrations=absolute(self.demonstrations), pretraining=absolute(self.pretraining))

    def rows(self, decisions: int) -> int:
        """`steps` x `batch_size`."""
        return self.steps * self.batch_size

    def step_rows(self, decisions: int) -> int:
        """`batch_size`."""
        return self.batch_size

    def episodes(self, tasks: tuple[Task, ...], key: Key) -> list[Episode]:
        """None: the experience is recorded already."""
        return []

    def update(
        self,
        policy: Policy,
        tasks: tuple[Task, ...],
        trajectories: list[Trajectory],
        strategies: Strategies,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> Metrics:
        """`steps` steps on decisions drawn with replacement."""
        names = tuple(task.name for task in tasks)
        target = _demonstrated(Path(self.demonstrations), names, policy)
        other = _demonstrated(Path(self.pretraining), None, policy) if self.pretraining else None
        taken = [
            gradient_step(policy, self.draw(target, other, rng), self.loss, strategies, optimizer, self.optimizer, rng)
            for _ in range(self.steps)
        ]
        return {name: float(np.mean([step[name] for step in taken])) for name in taken[0]} | {"kept": 1.0}

    def draw(self, target: Batch, other: Batch | None, rng: np.random.Generator) -> Batch:
        """`batch_size` decisions drawn with replacement, each from `target` with probability `target_share`."""
        if other is None:
            return target.take(rng.integers(len(target), size=self.batch_size))
        count = int(rng.binomial(self.batch_size, self.target_share))
        rows = rng.integers(len(target), size=count), rng.integers(len(other), size=self.batch_size - count)
        return concatenate([target.take(rows[0]), other.take(rows[1])])

    def loss(self, outputs: Outputs) -> tuple[Tensor, Mapping[str, float]]:
        """Each row's imitation loss, summed with weight 1 / batch_size."""
        return outputs.imitation_loss.sum() / self.batch_size, {}


@functools.lru_cache(maxsize=4)
def _demonstrated(folder: Path, names: tuple[str, ...] | None, policy: Policy) -> Batch:
    """All decisions of the demonstrations of some tasks, None for all that the folder holds."""
    return to_batch(load(folder, names), policy)
