"""One stage of a recipe on one task: experience, update, commit, again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from perennial import faults
from perennial.learning.base import Metrics, Objective
from perennial.policies.base import Policy
from perennial.randomness import Key, stream
from perennial.rollout.collect import OnEpisode
from perennial.rollout.trajectory import Trajectory
from perennial.rollout.workers import Workers
from perennial.strategies.composition import Strategies
from perennial.suites.base import Task


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, for logs and displays.

    Attributes:
        number: counted from 0 within the stage.
        success: mean success of the episodes played, 0 to 1; None without episodes.
        metrics: what the objective reports.
        rollout_seconds, update_seconds: wall clock, for display only.
    """

    number: int
    success: float | None
    episodes: int
    env_steps: int
    metrics: Metrics
    rollout_seconds: float
    update_seconds: float


def learn(
    objective: Objective,
    tasks: tuple[Task, ...],
    policy: Policy,
    strategies: Strategies,
    workers: Workers,
    optimizer: torch.optim.Optimizer,
    key: Key,
    seed: int,
    threads: int,
    start: int,
    on_episode: OnEpisode,
    on_iteration: Callable[[Iteration], None],
) -> None:
    """Run iterations `start` .. `objective.iterations` - 1 of the stage named by `key`.

    `on_iteration` commits the state; what it raises ends the stage. Updates are computed with `threads` threads, every
    core's, as the workers wait meanwhile.
    """
    for number in range(start, objective.iterations):
        begun = time.monotonic()
        trajectories: list[Trajectory] = []
        episodes = objective.episodes(tasks, (*key, number))
        if episodes:
            torch.set_num_threads(1)  # two OpenMP threads collapse beside busy workers
            workers.follow(policy)
            trajectories = workers.collect(episodes, on_episode)
        played = time.monotonic()
        faults.point("update")
        torch.set_num_threads(threads)
        metrics = objective.update(
            policy, tasks, trajectories, strategies, optimizer, stream(seed, "update", *key, number)
        )
        on_iteration(
            Iteration(
                number=number,
                success=sum(t.success for t in trajectories) / len(trajectories) if trajectories else None,
                episodes=len(trajectories),
                env_steps=int(sum(t.steps.sum() for t in trajectories)),
                metrics=metrics,
                rollout_seconds=played - begun,
                update_seconds=time.monotonic() - played,
            )
        )
