"""Proximal policy optimisation (PPO, Schulman et al., arXiv 1707.06347) for action tokens, with a value head.

A decision is a whole chunk of actions: rewards are discounted from chunk to chunk, and generalised advantage estimation
(arXiv 1506.02438) runs over decisions. The reward is 1 at success and 0 otherwise. An episode that runs out of time is
over like one that succeeds, and the value after its last decision is 0: the task is to succeed within the horizon, so
what might have come later is worth nothing, and evaluation does not count it either. A value is therefore the
discounted probability of success.

The surrogate is that of `grpo`, with one ratio per token and symmetric clipping; every executed token weighs the same,
which makes it the plain policy gradient at the acting weights. The value loss is the paper's squared error, without the
clipping of the values that some code adds. Advantages are standardised over the iteration, as RLinf and most code do
and the paper does not say. An iteration without any success is skipped, because its advantages would be nothing but
the errors of the value head, blown up to the usual size; only strategies that look at every state visited
(`Strategy.wants_all`) act in it.

The value head is carried on from task to task, like the adapter. Its loss reaches the policy too, as the two share
everything below the head.
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
from perennial.learning.advantages import EPSILON, gae
from perennial.learning.base import Metrics, Objective
from perennial.policies.base import Batch, Outputs, Policy
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode, Trajectory, to_batch
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task


@dataclass(frozen=True)
class PPO(Objective):
    """On-policy reinforcement learning with a critic.

    Attributes:
        rollouts: episodes per iteration.
        initial_states: training states that the episodes cycle through.
        temperature: of sampling while training.
        gamma: discount from one decision to the next, in (0, 1].
        gae_lambda: 0 trusts the value head (one step ahead), 1 trusts the outcome (Monte Carlo).
        clip: the ratio is clipped to [1 - clip, 1 + clip].
        value_coefficient: weight of the squared error of the values, at least 0.
        value_rate: learning rate of the value head as a multiple of the policy's; RLinf has 150 at 2e-5.
        entropy_coefficient: weight of the entropy bonus, at least 0; above 0 the policy must have logits.
        epochs: passes over the decisions of an iteration.
        minibatches: optimiser steps per pass.
    """

    name: ClassVar[str] = "ppo"
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"gae_lambda", "value_coefficient", "entropy_coefficient"})
    rollouts: int = 128
    initial_states: int = 16
    temperature: float = 1.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.5
    value_rate: float = 1.0
    entropy_coefficient: float = 0.0
    epochs: int = 2
    minibatches: int = 4

    def requires(self) -> frozenset[str]:
        """Log-probabilities and values, and logits for an entropy bonus."""
        return frozenset({"log_prob", "value"} | ({"logits"} if self.entropy_coefficient else set()))

    def check(self, tasks: Sequence[str]) -> None:
        """Discount and lambda are at most 1."""
        for name in ("gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise PerennialError(f"--recipe.ppo.{name} is {getattr(self, name)}, but it must be at most 1.")

    def rows(self, decisions: int) -> int:
        """`epochs` passes over every decision."""
        return self.epochs * decisions

    def step_rows(self, decisions: int) -> int:
        """A pass over every decision in `minibatches` steps."""
        return math.ceil(decisions / self.minibatches)

    def episodes(self, tasks: tuple[Task, ...], key: Key) -> list[Episode]:
        """`rollouts` episodes, dealt to `tasks` and initial states in turn."""
        return deal(tasks, key, self.rollouts, 1, self.initial_states, self.temperature)

    def update(
        self,
        policy: Policy,
        tasks: tuple[Task, ...],
        trajectories: list[Trajectory],
        strategies: Strategies,
        optimizer: torch.optim.Optimizer,
        rng: np.random.Generator,
    ) -> Metrics:
        """`epochs` x `minibatches` clipped steps on all decisions; without any success, of strategies alone or none."""
        won = any(trajectory.success for trajectory in trajectories)
        if not won and not strategies.wants_all():
            nothing = ("loss", "penalty", "grad_norm", "kl", "clip_fraction", "value_loss", "explained_variance")
            return dict.fromkeys((*nothing, "kept"), 0.0)
        batch, explained = self.assess(policy, trajectories)
        if not won:
            batch, explained = replace(batch, weight=np.zeros(batch.mask.shape, np.float32)), 0.0
        metrics = passes(
            policy, batch, self.loss, strategies, optimizer, self.optimizer, rng, self.epochs, self.minibatches
        )
        return metrics | {"explained_variance": explained, "kept": float(won)}

    def assess(self, policy: Policy, trajectories: list[Trajectory]) -> tuple[Batch, float]:
        """All decisions with standardised advantages, value targets and weights, and how much the values explain.

        The target of a value is its advantage plus itself, the lambda-return. Explained is the share of the variance
        of the discounted returns, 1 at best, and 0 where these do not vary.
        """
        batch = to_batch(trajectories, policy.token_steps)
        values = _values(policy, batch, self.optimizer.rows)
        ends = np.cumsum([len(t.steps) for t in trajectories])
        rewards = np.zeros(len(batch))
        rewards[ends - 1] = [t.reward for t in trajectories]

        def advantages(trace: float) -> np.ndarray:
            episodes = zip(np.split(rewards, ends[:-1]), np.split(values, ends[:-1]), strict=True)
            return np.concatenate([gae(r, v, self.gamma, trace) for r, v in episodes])

        advantage, error = advantages(self.gae_lambda), advantages(1.0)
        variance = float(np.var(values + error))
        standard = (advantage - advantage.mean()) / (advantage.std() + EPSILON)
        batch = replace(
            batch,
            advantage=standard.astype(np.float32),
            target=(values + advantage).astype(np.float32),
            weight=(batch.mask / batch.mask.sum()).astype(np.float32),
        )
        return batch, 1 - float(np.var(error)) / variance if variance else 0.0

    def loss(self, outputs: Outputs) -> tuple[Tensor, Mapping[str, float]]:
        """Surrogate, squared error of the values and entropy bonus, weighted and summed over tokens."""
        batch, log_prob, value = outputs.batch, outputs.log_prob, outputs.value
        assert batch.weight is not None
        assert batch.target is not None
        loss, figures = clipped_surrogate(log_prob, batch, self.clip, self.clip)
        weight = torch.from_numpy(batch.weight).to(value.device)
        target = torch.from_numpy(batch.target).to(value.device)
        error = ((value - target) ** 2 * weight.sum(1)).sum()
        loss = loss + self.value_coefficient * error
        figures = {**figures, "value_loss": float(error.detach())}
        if self.entropy_coefficient:
            log_probs = (outputs.logits / batch.temperature).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            loss = loss - self.entropy_coefficient * (entropy * weight).sum()
            mask = torch.from_numpy(batch.mask).to(value.device)
            figures["entropy"] = float((entropy.detach() * mask).sum())
        return loss, figures


@torch.no_grad()
def _values(policy: Policy, batch: Batch, rows: int) -> np.ndarray:
    """Values of all decisions, float64 [N], `rows` at a time."""
    values: np.ndarray = torch.cat([policy.value(part) for part in batch.parts(rows)]).cpu().numpy().astype(np.float64)
    return values
