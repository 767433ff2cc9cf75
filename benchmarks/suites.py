"""Measures a task of a suite, in the environment of that suite, and adds a row to suites.json and docs/benchmarks.md.

python benchmarks/suites.py libero object-0 [--repeats 5]

Other work may share the machine, so all times are seconds of this process's processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch

import page
import rollout
from perennial import discovery
from perennial.doctor import describe_machine
from perennial.policies.base import Policy
from perennial.randomness import stream
from perennial.rollout.collect import Environments, play
from perennial.rollout.trajectory import Episode
from perennial.suites.base import Environment, Suite, Task

SLOTS, STEPS, IMAGES, SIZES = 4, 40, 8, (64, 224)

Result = dict[str, float]
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Benchmarks of a suite.")
    parser.add_argument("suite")
    parser.add_argument("task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="another file than benchmarks/suites.json, and no page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    row = measure(options.suite, options.task, options.repeats)
    target = options.out or page.ROOT / "benchmarks" / "suites.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    tasks = found.get(options.suite, {}).get("tasks", {}) | {options.task: row}
    entry = {"machine": describe_machine(), "slots": SLOTS, "tasks": tasks}
    target.write_text(json.dumps(found | {options.suite: entry}, indent=2) + "\n")
    if options.out is None:
        page.write()
    print(json.dumps(row, indent=2))


def measure(suite_name: str, task: str, repeats: int) -> Result:
    """All columns of one row."""
    suite = discovery.find("suites", suite_name, Suite)()
    policy = _policy(suite)
    before = _memory()
    small, large = Environments(suite, SIZES[0]), Environments(suite, SIZES[1])
    with closing(small), closing(large):
        construction, first = _timed(lambda: _built(small, task))
        further, second = _timed(lambda: _built(small, task))
        for environment in (first, second):
            small.give_back(task, suite.variants[0], environment)
        collected = _collected(policy, small, suite.tasks[task], repeats)
        memory = _memory()
        alone = _alone(suite, task, small, large, repeats)
    return {
        **alone,
        **collected,
        "construction_seconds": construction,
        "further_seconds": further,
        "memory_mb": memory,
        "memory_without_suite_mb": before,
        "repeats": repeats,
    }


def _policy(suite: Suite) -> Policy:
    """The small policy, with random weights and the numbers of inputs and outputs that the suite has."""
    rng = stream(0, "benchmark", suite.name)
    sentences = [i for task in suite.tasks.values() for i in (*task.instructions, task.evaluation_instruction)]
    actions = rng.uniform(-1, 1, (256, suite.action_dim)).astype(np.float32)
    states = rng.uniform(-1, 1, (256, suite.state_dim)).astype(np.float32)
    return discovery.find("policies", "openvla_oft", Policy).fresh(sentences, actions, states, 0)


def _built(environments: Environments, task: str) -> Environment:
    """An environment that has begun an episode and drawn a picture."""
    environment = environments.borrow(task, "id")
    _begin(environment)
    environment.render()
    return environment


def _begin(environment: Environment) -> None:
    environment.reset(options={"split": "training", "index": 0})


def _collected(policy: Policy, environments: Environments, task: Task, repeats: int) -> Result:
    """Episodes as `play` collects them, against the same actions and images without a policy, in turn."""
    episodes = [
        Episode(task.name, "id", "training", i, task.instructions[0], 1.0, ("benchmark", task.name, i))
        for i in range(SLOTS)
    ]
    share = rollout.share_of(policy, play(policy, environments, episodes, 0, SLOTS))
    rollout.replay(environments, share)
    seconds = [
        (
            _timed(lambda: play(policy, environments, episodes, 0, SLOTS))[0],
            _timed(lambda: rollout.replay(environments, share))[0],
        )
        for _ in range(repeats)
    ]
    steps = sum(int(executed.sum()) for _, _, executed in share)
    return {
        "collected_steps_per_second": steps / _median(pair[0] for pair in seconds),
        "replayed_steps_per_second": steps / _median(pair[1] for pair in seconds),
        "share_of_ceiling": _median(ceiling / taken for taken, ceiling in seconds),
    }


def _alone(suite: Suite, task: str, small: Environments, large: Environments, repeats: int) -> Result:
    """Steps, pictures and resets of one environment."""
    environments = {size: _built(those, task) for size, those in zip(SIZES, (small, large), strict=True)}
    environment = environments[SIZES[0]]
    rng = stream(0, "benchmark actions", suite.name, task)
    space = environment.action_space
    actions = rng.uniform(space.low, space.high, (STEPS, suite.action_dim)).astype(np.float32)  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        found.setdefault("reset", []).append(_timed(lambda: _begin(environment))[0])
        found.setdefault("step", []).append(_timed(lambda: [environment.step(a) for a in actions])[0] / STEPS)
        for size, drawing in environments.items():
            _begin(drawing)
            found.setdefault(f"image {size}", []).append(_drawing(drawing, actions[:IMAGES]))
    for size, those in zip(SIZES, (small, large), strict=True):
        those.give_back(task, "id", environments[size])
    seconds = {name: _median(values) for name, values in found.items()}
    return {
        "steps_per_second": 1 / seconds["step"],
        **{f"images_per_second_{size}": 1 / seconds[f"image {size}"] for size in SIZES},
        "reset_ms": 1000 * seconds["reset"],
    }


def _drawing(environment: Environment, actions: np.ndarray) -> float:
    """Seconds for one look of a policy, each after a step that is not counted."""
    taken = 0.0
    for action in actions:
        environment.step(action)
        taken += _timed(environment.render)[0]
    return taken / len(actions)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of processor time, and the result."""
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _memory() -> float:
    """Of this process, in MB."""
    return float(psutil.Process().memory_info().rss / 2**20)


if __name__ == "__main__":
    main()
