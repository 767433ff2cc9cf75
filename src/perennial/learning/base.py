"""What an objective is, and the gradient step that all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self, get_args

import numpy as np
import torch
from torch import Tensor

from perennial.errors import LearningError
from perennial.learning.optimizer import AdamWConfig, set_learning_rate
from perennial.policies._groups import Group
from perennial.policies.base import Batch, Outputs, Policy
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task

Metrics = dict[str, float]


@dataclass(frozen=True)
class Objective(ABC):
    """One stage of a recipe: what is experienced and what is minimised, with its budget.

    Attributes:
        iterations: rounds of experience and update per task.
        optimizer: how steps are made; a fresh optimiser starts with every task.
        learns: groups of the policy's parameters that learn; the others are frozen.
        may_be_zero: names of numbers that may be 0; all others must be above 0, and none below.
    """

    name: ClassVar[str]
    may_be_zero: ClassVar[frozenset[str]] = frozenset()
    iterations: int = 12
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    learns: tuple[Group, ...] = get_args(Group)

    def requires(self) -> frozenset[str]:
        """Names of optional policy methods that this objective calls."""
        return frozenset()

    @property
    def value_rate(self) -> float:
        """Learning rate of the policy's value head, where it has one, as a multiple of the recipe's."""
        return 1.0

    def check(self, tasks: Sequence[str]) -> None:
        """See that what is needed to learn the tasks of these names is there, before a run starts.

        Raises:
            PerennialError: it is not.
        """
        return

    def settled(self) -> Self:
        """The same stage, with paths that do not depend on the present folder."""
        return self

    def rows(self, decisions: int) -> int:
        """Rows that one update passes forward and backward at most, where `decisions` were played for it."""
        return decisions

    def step_rows(self, decisions: int) -> int:
        """Rows of one optimiser step at most, where `decisions` were played for the update."""
        return self.rows(decisions)

    @abstractmethod
    def episodes(self, tasks: tuple[Task, ...], key: Key) -> list[Episode]:
        """The episodes to play before the update named by `key`; none for learning from demonstrations."""

    @abstractmethod
    def update(
        self,
        policy: Policy,
        tasks: tuple[Task, ...],
        trajectories: list[Trajectory],
        strategies: Strategies,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> Metrics:
        """Learn `tasks` from `trajectories`. The metrics hold at least `loss`, `grad_norm` and `kept`.

        `kept` is the share of decisions that carried a learning signal; with 0 no step was made, except for strategies
        that want all decisions.
        """


Loss = Callable[[Outputs], tuple[Tensor, Mapping[str, float]]]
"""The loss of some rows of a batch, a sum with the rows' weights, and figures to add up over rows."""


def gradient_step(
    policy: Policy,
    batch: Batch,
    loss: Loss,
    strategies: Strategies,
    optimizer: torch.optim.Optimizer,
    config: AdamWConfig,
    rng: np.random.Generator,
) -> Metrics:
    """One optimiser step on `batch` and what is replayed, in micro-batches whose gradients add up to that of the whole.

    Returns:
        `loss`, `penalty` (all that the strategies add to it), `grad_norm` before clipping, and the sums of the figures
        that `loss` gave.

    Raises:
        LearningError: the loss or the gradient is not finite; no step is made.
    """
    optimizer.zero_grad(set_to_none=True)
    metrics: Metrics = {"loss": 0.0, "penalty": 0.0}
    for part in batch.parts(config.rows):
        outputs = policy.outputs(part)
        total, figures = loss(outputs)
        metrics["loss"] += float(total.detach())
        added = strategies.batch_loss(outputs, batch)
        if added is not None:
            metrics["penalty"] += float(added.detach())
            total = total + added
        total.backward()  # type: ignore[no-untyped-call]
        for name, value in figures.items():
            metrics[name] = metrics.get(name, 0.0) + value
        del outputs  # and with it what the forward pass kept, before the next one begins
    for beside in strategies.losses_beside(policy, rng, len(batch), config.rows):
        metrics["penalty"] += float(beside.detach())
        beside.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    if not all(map(math.isfinite, metrics.values())):
        raise LearningError(
            f"The update became not-a-number (loss {metrics['loss']}, penalty {metrics['penalty']}, gradient norm "
            f"{metrics['grad_norm']}); start a new run with a lower learning rate."
        )
    set_learning_rate(optimizer, config)
    optimizer.step()
    strategies.after_step(policy)
    return metrics
