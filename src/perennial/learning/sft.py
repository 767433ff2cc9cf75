"""Supervised fine-tuning on demonstrations of the task at hand: the ablation of on-policy learning."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from perennial.demonstrations.dataset import load, to_batch
from perennial.errors import PerennialError
from perennial.learning.base import Metrics, Objective, gradient_step
from perennial.policies.base import Batch, Policy
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies._composition import Strategies
from perennial.suites.base import Task


@dataclass(frozen=True)
class SFT(Objective):
    """Behaviour cloning.

    Attributes:
        demonstrations: folder that `perennial demos` wrote, with all trained tasks in it.
        steps: gradient steps per iteration.
        batch_size: decisions in a step.
    """

    name: ClassVar[str] = "sft"
    demonstrations: str = "demonstrations"
    steps: int = 8
    batch_size: int = 256

    def check(self, tasks: Sequence[str]) -> None:
        """Every task has been demonstrated."""
        for task in tasks:
            if not any(Path(self.demonstrations, task).glob("*.safetensors")):
                raise PerennialError(
                    f"There is no demonstration of {task} in {self.demonstrations!r}; record some by "
                    f"`perennial demos {self.demonstrations} --tasks {task}`, or set --recipe.sft.demonstrations."
                )

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
        batch = _demonstrated(Path(self.demonstrations), names, policy)
        taken = [
            gradient_step(
                policy,
                batch.take(rng.integers(len(batch), size=self.batch_size)),
                self.loss,
                strategies,
                optimizer,
                self.optimizer,
                rng,
            )
            for _ in range(self.steps)
        ]
        return {name: float(np.mean([step[name] for step in taken])) for name in taken[0]} | {"kept": 1.0}

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Each row's imitation loss, summed with weight 1 / batch_size."""
        return policy.imitation_loss(batch).sum() / self.batch_size, {}


@functools.lru_cache(maxsize=4)
def _demonstrated(folder: Path, names: tuple[str, ...], policy: Policy) -> Batch:
    """All decisions of the demonstrations of some tasks."""
    return to_batch(load(folder, names), policy)
