"""The plain way, as a peer: Meta-World in gymnasium's AsyncVectorEnv, drawn at its default settings at every step."""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from typing import Any

import gymnasium

STEPS = 40


def build(task: str, size: int) -> gymnasium.Env[Any, Any]:
    """One Meta-World environment whose observation comes with a picture."""
    from perennial.suites._mujoco import choose_gl

    choose_gl()
    import metaworld  # noqa: F401  registers the environments

    environment = gymnasium.make(
        "Meta-World/MT1", env_name=task, render_mode="rgb_array", camera_name="corner2", width=size, height=size
    )
    return gymnasium.wrappers.AddRenderObservation(environment, render_only=False)


def measure(task: str, size: int, repeats: int) -> float:
    """Environment steps per second of one environment per core with random actions, median of `repeats`."""
    count = multiprocessing.cpu_count()
    environments = gymnasium.vector.AsyncVectorEnv([functools.partial(build, task, size)] * count, context="spawn")
    environments.reset(seed=0)
    environments.step(environments.action_space.sample())
    rates = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(STEPS):
            environments.step(environments.action_space.sample())
        rates.append(STEPS * count / (time.perf_counter() - begun))
    environments.close()
    return statistics.median(rates)
