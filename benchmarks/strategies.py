"""What guarding old skills costs in a gradient step, beyond the samples that a strategy replays.

python benchmarks/strategies.py [--repeats 5]

It writes benchmarks/strategies.json and its part of docs/benchmarks.md; `make bench` does so with everything else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

import page
from perennial import discovery, machine
from perennial.config import Config, preset
from perennial.doctor import describe_machine
from perennial.learning.base import gradient_step
from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import build_optimizer
from perennial.policies.base import Policy
from perennial.policies.lora import add_adapter
from perennial.randomness import stream
from perennial.rollout.workers import Cast, start_workers
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.strategies.base import Strategy
from perennial.strategies.composition import Strategies
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ewc import EWC
from perennial.strategies.replay import Replay
from perennial.suites.base import Suite


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="What strategies cost in a gradient step.")
    parser.add_argument("--repeats", type=int, default=5)
    write(preset("demo"), parser.parse_args().repeats)
    print(page.write())


def write(config: Config, repeats: int) -> None:
    """Measure, and write benchmarks/strategies.json."""
    overhead, steps = measure(config, repeats)
    found = {"machine": describe_machine(), "steps": steps, "overhead": overhead}
    (page.ROOT / "benchmarks" / "strategies.json").write_text(json.dumps(found, indent=2) + "\n")


def measure(config: Config, repeats: int) -> tuple[dict[str, float], int]:
    """Share of a step's processor time that each strategy adds, 0.1 is 10 %, and from how many steps.

    A step that replays is compared with a plain one on as many rows in the same micro-batches, so that a replayed row
    may cost what a row of the update costs, and the optimiser's own work counts once. Steps to be compared follow each
    other, and each figure is the median of their paired ratios. The learning rate is 0: every step does the same work.
    """
    suite = discovery.find("suites", config.suite, Suite)()
    checkpoint = checkpoint_folder(config.policy.checkpoint)
    policy = discovery.find("policies", config.policy.name, Policy).load(checkpoint)
    assert config.policy.adapter is not None
    add_adapter(policy, config.policy.adapter, config.seed)
    grpo = config.recipe[0]
    assert isinstance(grpo, GRPO)
    first, second = (suite.tasks[name] for name in config.tasks.trained[:2])
    cast = Cast(config.suite, config.policy.name, checkpoint, config.seed)
    with closing(start_workers(config.workers, cast, policy.acting_weights())) as workers:
        played = {task.name: workers.collect(grpo.episodes((task,), ("bench", 0))) for task in (first, second)}
    torch.set_num_threads(machine.cores())
    kept = [trajectory for trajectory in played[first.name] if trajectory.success]
    guarded: dict[str, Strategy] = {
        "ewc": EWC(),
        "replay": Replay(capacity=512),
        "dark_replay": DarkReplay(capacity=512),
    }
    for strategy in guarded.values():
        strategy.before_task(first, policy)
        strategy.remember(first, policy, lambda count: kept[:count])
        strategy.before_task(second, policy)

    batch, _ = weighted_batch(policy, played[second.name])
    size = len(batch) // grpo.minibatches
    settings = replace(grpo.optimizer, learning_rate=0.0, micro_batch=size)
    optimizer = build_optimizer(policy, Strategies(), settings)

    def seconds(rows: np.ndarray, *strategies: Strategy) -> float:
        part, rng = batch.take(rows), stream(0, "bench", "replay")
        begun = time.process_time()
        gradient_step(policy, part, grpo.loss, Strategies(strategies), optimizer, settings, rng)
        return time.process_time() - begun

    ratios: dict[str, list[float]] = {name: [] for name in guarded}
    for step in range(grpo.minibatches * repeats + 1):
        order = stream(0, "bench", "rows", step).permutation(len(batch))
        for name, strategy in guarded.items():
            replayed = strategy.replay(stream(0, "bench", "replay"), size)
            plain = seconds(order[: size + (0 if replayed is None else len(replayed))])
            ratio = seconds(order[:size], strategy) / plain
            if step:  # the first round only warms up
                ratios[name].append(ratio)
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}, grpo.minibatches * repeats


if __name__ == "__main__":
    main()
