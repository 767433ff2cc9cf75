"""Group relative policy optimisation (GRPO) for action tokens.

As trained in arXiv 2603.11653: groups of rollouts from one initial state, reward 1 at success, advantages within the
group with the unbiased standard deviation, a ratio for every token, clipping to [1 - 0.20, 1 + 0.28], no KL term, no
entropy bonus, and every trajectory weighs the same whatever its length. Left out of that code because it changes
nothing but the cost: steps after success, and groups whose returns are all equal, whose gradient is zero. They are
dropped before forward and backward while the divisor stays the full number of trajectories. They are kept only for
strategies that look at every state visited (`Strategy.wants_all`), which then act also where all groups are equal.

Default budget and learning rate are those of the small policy; presets hold the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.learning._on_policy import clipped_surrogate, deal, passes
from perennial.learning.advantages import group_relative
from perennial.learning.base import Metrics, Objective
from perennial.policies.base import Batch, Outputs, Policy
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode, Trajectory, to_batch
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task


@dataclass(frozen=True)
class GRPO(Objective):
    """On-policy reinforcement learning without a critic.

    Attributes:
        groups: groups per iteration.
        group_size: rollouts from one initial state, at least 2.
        initial_states: training states that the groups cycle through; the paper uses 50.
        temperature: of sampling while training.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        epochs: passes over the decisions of an iteration; the paper makes one.
        minibatches: optimiser steps per pass; the paper makes 8.
    """

    name: ClassVar[str] = "grpo"
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"clip_low", "clip_high"})
    groups: int = 16
    group_size: int = 8
    initial_states: int = 16
    temperature: float = 1.0
    clip_low: float = 0.20
    clip_high: float = 0.28
    epochs: int = 2
    minibatches: int = 4

    def requires(self) -> frozenset[str]:
        """Log-probabilities."""
        return frozenset({"log_prob"})

    def check(self, tasks: Sequence[str]) -> None:
        """A group has someone to be compared with."""
        if self.group_size < 2:
            raise PerennialError(
                f"--recipe.grpo.group_size is {self.group_size}, but a group needs at least 2 rollouts."
            )

    def rows(self, decisions: int) -> int:
        """`epochs` passes over every decision."""
        return self.epochs * decisions

    def step_rows(self, decisions: int) -> int:
        """A pass over every decision in `minibatches` steps."""
        return math.ceil(decisions / self.minibatches)

    def episodes(self, tasks: tuple[Task, ...], key: Key) -> list[Episode]:
        """`groups` x `group_size` episodes; groups are dealt to `tasks` and initial states in turn."""
        return deal(tasks, key, self.groups, self.group_size, self.initial_states, self.temperature)

    def update(
        self,
        policy: Policy,
        tasks: tuple[Task, ...],
        trajectories: list[Trajectory],
        strategies: Strategies,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> Metrics:
        """`epochs` x `minibatches` clipped steps on the decisions that carry a gradient, or that a strategy wants."""
        batch, share = weighted_batch(policy, trajectories, strategies.wants_all())
        if len(batch) == 0:
            return {"loss": 0.0, "grad_norm": 0.0, "kept": 0.0, "kl": 0.0, "clip_fraction": 0.0, "penalty": 0.0}
        metrics = passes(
            policy, batch, self.loss, strategies, optimizer, self.optimizer, rng, self.epochs, self.minibatches
        )
        return metrics | {"kept": share}

    def loss(self, outputs: Outputs) -> tuple[Tensor, Mapping[str, float]]:
        """The clipped surrogate of some decisions, weighted and summed over tokens."""
        return clipped_surrogate(outputs.log_prob, outputs.batch, self.clip_low, self.clip_high)


def weighted_batch(policy: Policy, trajectories: list[Trajectory], everything: bool = False) -> tuple[Batch, float]:
    """The decisions with a non-zero advantage, or `everything`, and the share of all decisions that have one.

    A token's weight is 1 / (trajectories x executed tokens of its trajectory), so the sum of weighted token losses is
    the mean over all trajectories, dropped ones included, of the mean over each trajectory's tokens.
    """
    advantages = group_relative(trajectories)
    judged = list(zip(trajectories, advantages, strict=True))
    share = sum(len(t.steps) for t, a in judged if a != 0) / sum(len(t.steps) for t in trajectories)
    used = [(t, a) for t, a in judged if everything or a != 0]
    if not used:
        return to_batch(trajectories[:1], policy.token_steps).take(np.arange(0)), 0.0
    batch = to_batch([t for t, _ in used], policy.token_steps)
    lengths = [len(t.steps) for t, _ in used]
    owner = np.repeat(np.arange(len(used)), lengths)
    tokens = np.bincount(owner, weights=batch.mask.sum(axis=1))
    weight = batch.mask / (len(trajectories) * tokens[owner])[:, None]
    advantage = np.array([a for _, a in used], np.float32)[owner]
    return replace(batch, advantage=advantage, weight=weight.astype(np.float32)), share
