"""What guarding old skills costs in an update, beyond the samples that a strategy replays."""

from __future__ import annotations

import statistics
import time
from contextlib import closing

import torch

from perennial import discovery
from perennial.config import Config, checkpoint_folder
from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import build_optimizer
from perennial.learning.stage import learner_threads
from perennial.policies.base import Policy
from perennial.policies.lora import add_adapter
from perennial.randomness import stream
from perennial.rollout.workers import Cast, start_workers
from perennial.strategies._composition import Strategies
from perennial.strategies.base import Strategy
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ewc import EWC
from perennial.strategies.replay import Replay
from perennial.suites.base import Suite

DECISIONS = 512
"""Kept for replay: more than one step asks for."""

Result = dict[str, float | str]


def measure(config: Config, repeats: int) -> Result:
    """Share of an update's time that each strategy adds, where replayed samples count like others; 0.1 is 10 %.

    Plain and guarded updates take turns on the same trajectories; each figure is the median of the paired ratios.
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
    torch.set_num_threads(learner_threads())
    kept = [trajectory for trajectory in played[first.name] if trajectory.success]
    guarded: dict[str, Strategy] = {
        "ewc": EWC(),
        "replay": Replay(capacity=512),
        "dark_replay": DarkReplay(capacity=512),
    }
    for strategy in guarded.values():
        strategy.before_task(first, policy)
        strategy.after_task(first, policy, lambda count: kept[:count])
        strategy.before_task(second, policy)

    def seconds(strategies: Strategies, repeat: int) -> float:
        optimizer = build_optimizer(policy, strategies, grpo.optimizer)
        begun = time.perf_counter()
        grpo.update(policy, (second,), played[second.name], strategies, optimizer, stream(0, "bench", repeat))
        return time.perf_counter() - begun

    rows = len(weighted_batch(policy, played[second.name])[0]) // grpo.minibatches
    ratios: dict[str, list[float]] = {name: [] for name in guarded}
    for repeat in range(repeats + 1):
        plain = seconds(Strategies(), repeat)
        for name, strategy in guarded.items():
            replayed = strategy.replay(stream(0, "bench"), rows)
            samples = 1 + (0 if replayed is None else len(replayed)) / rows
            ratio = seconds(Strategies((strategy,)), repeat) / (plain * samples)
            if repeat:  # the first round only warms up
                ratios[name].append(ratio)
    return {f"{name}_overhead": statistics.median(values) - 1 for name, values in ratios.items()}
