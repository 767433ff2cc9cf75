"""What objectives that learn from fresh rollouts share: dealing episodes, a clipped surrogate, passes over a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from perennial.learning.base import Loss, Metrics, gradient_step
from perennial.learning.optimizer import AdamWConfig
from perennial.policies.base import Batch, Policy
from perennial.randomness import Key
from perennial.rollout.trajectory import Episode
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task

PER_TOKEN = ("kl", "clip_fraction", "entropy")
"""Figures of a loss that are sums over executed tokens, whose number is the figure `tokens`."""


def deal(
    tasks: tuple[Task, ...], key: Key, groups: int, size: int, initial_states: int, temperature: float
) -> list[Episode]:
    """`groups` x `size` training episodes; groups are dealt to `tasks` and initial states in turn.

    Args:
        tasks: are learned together.
        key: names the streams of the episodes; its last part is the iteration.
        groups: how many groups.
        size: episodes of a group, which share one initial state.
        initial_states: training states that the groups cycle through.
        temperature: of sampling.
    """
    iteration = int(key[-1])
    episodes: list[Episode] = []
    for group in range(groups):
        turn = iteration * groups + group
        task = tasks[turn % len(tasks)]
        state = turn // len(tasks) % initial_states
        instruction = task.instructions[turn // len(tasks) % len(task.instructions)]
        episodes.extend(
            Episode(task.name, "id", "training", state, instruction, temperature, (*key, group, member), group)
            for member in range(size)
        )
    return episodes


def clipped_surrogate(log_prob: Tensor, batch: Batch, low: float, high: float) -> tuple[Tensor, Mapping[str, float]]:
    """The loss of PPO (arXiv 1707.06347, eq. 7) with a ratio for every token, weighted and summed over tokens.

    Args:
        log_prob: of the policy that learns, float32 [N, K].
        batch: with `log_prob` of acting, `advantage` and `weight`.
        low: the ratio is clipped to at least 1 - low,
        high: and to at most 1 + high.
    """
    assert batch.log_prob is not None
    assert batch.advantage is not None
    assert batch.weight is not None
    device = log_prob.device
    weight = torch.from_numpy(batch.weight).to(device)
    advantage = torch.from_numpy(batch.advantage).to(device)[:, None]
    log_ratio = log_prob - torch.from_numpy(batch.log_prob).to(device)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        mask = torch.from_numpy(batch.mask).to(device)
        figures = {
            "tokens": float(mask.sum()),
            "kl": float(((ratio - 1 - log_ratio) * mask).sum()),
            "clip_fraction": float(((ratio * advantage > clipped * advantage) * mask).sum()),
        }
    return -(surrogate * weight).sum(), figures


def passes(
    policy: Policy,
    batch: Batch,
    loss: Loss,
    strategies: Strategies,
    optimizer: torch.optim.Optimizer,
    config: AdamWConfig,
    rng: np.random.Generator,
    epochs: int,
    minibatches: int,
) -> Metrics:
    """`epochs` x `minibatches` gradient steps on the rows of `batch`, in a new order each epoch; their mean metrics."""
    parts = min(minibatches, len(batch))
    steps: list[Metrics] = []
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(batch)), parts):
            part = batch.take(rows)
            assert part.weight is not None
            # Each minibatch stands for the whole: its loss is scaled up by the number of minibatches.
            part = replace(part, weight=part.weight * parts)
            steps.append(gradient_step(policy, part, loss, strategies, optimizer, config, rng))
    totals = {name: sum(step[name] for step in steps) for name in steps[0]}
    tokens = totals.pop("tokens")
    return {name: total / (tokens if name in PER_TOKEN else len(steps)) for name, total in totals.items()}
