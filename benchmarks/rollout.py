"""Rollouts against the simulator's ceiling: the same episodes with the same actions and images, but no policy."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from perennial import discovery
from perennial.config import Config
from perennial.policies.base import Policy
from perennial.rollout.collect import Environments
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.rollout.workers import Cast, start_workers
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.suites.base import Suite

Result = dict[str, float | str]


def measure(config: Config, repeats: int) -> Result:
    """Environment steps per second of one GRPO iteration's episodes, with and without the policy, in turn."""
    suite = discovery.find("suites", config.suite, Suite)()
    checkpoint = checkpoint_folder(config.policy.checkpoint)
    policy = discovery.find("policies", config.policy.name, Policy).load(checkpoint)
    tasks = tuple(suite.tasks[name] for name in config.tasks.trained)
    episodes = config.recipe[0].episodes(tasks, ("bench", 0))
    cast = Cast(config.suite, config.policy.name, checkpoint, config.seed)
    count = config.workers.count or multiprocessing.cpu_count()
    with (
        closing(start_workers(config.workers, cast, policy.acting_weights())) as workers,
        multiprocessing.get_context("spawn").Pool(count, _prepare, (config.suite, policy.image_size)) as pool,
    ):
        trajectories = workers.collect(episodes)
        shares = [share_of(policy, trajectories[i::count]) for i in range(count)]
        pool.map(_replay, shares, chunksize=1)  # builds the environments
        seconds: dict[str, list[float]] = {"policy": [], "ceiling": []}
        for _ in range(repeats):
            begun = time.perf_counter()
            workers.collect(episodes)
            seconds["policy"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            pool.map(_replay, shares, chunksize=1)
            seconds["ceiling"].append(time.perf_counter() - begun)
    steps = sum(int(t.steps.sum()) for t in trajectories)
    rates = {name: steps / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [c / p for p, c in zip(seconds["policy"], seconds["ceiling"], strict=True)]
    return {
        "steps_per_second": rates["policy"],
        "ceiling_steps_per_second": rates["ceiling"],
        "share_of_ceiling": statistics.median(ratios),
        "episodes_per_second": len(episodes) / statistics.median(seconds["policy"]),
    }


Share = list[tuple[Episode, np.ndarray, np.ndarray]]


def share_of(policy: Policy, trajectories: Sequence[Trajectory]) -> Share:
    """Each episode with the actions that were executed, [T, C, D], and how many of each chunk."""
    decode = policy.decode  # type: ignore[attr-defined]
    return [(t.episode, decode(t.samples), t.steps) for t in trajectories]


_environments: Environments


def _prepare(suite: str, image_size: int) -> None:
    """Give a process of the pool its environments."""
    global _environments
    _environments = Environments(discovery.find("suites", suite, Suite)(), image_size)


def _replay(share: Share) -> None:
    replay(_environments, share)


def replay(environments: Environments, share: Share) -> None:
    """Play the recorded actions: one image per chunk, then its steps."""
    for episode, actions, steps in share:
        environment = environments.borrow(episode.task, episode.variant)
        environment.reset(options={"split": episode.split, "index": episode.initial_state})
        for chunk, executed in zip(actions, steps, strict=True):
            environment.render()
            for action in chunk[:executed]:
                environment.step(action)
        environments.give_back(episode.task, episode.variant, environment)
