"""One GRPO update on real trajectories, with and without the work that cannot change its gradient."""

from __future__ import annotations

import statistics
import time
from contextlib import closing

import numpy as np
import torch

from perennial import discovery, machine
from perennial.config import Config
from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import build_optimizer
from perennial.policies.base import Batch, Policy
from perennial.policies.lora import add_adapter
from perennial.randomness import stream
from perennial.rollout.workers import Cast, start_workers
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.strategies.composition import Strategies
from perennial.suites.base import Suite

Result = dict[str, float | str]


def measure(config: Config, repeats: int) -> Result:
    """Acting, updating and what is saved, for the episodes of one iteration on the first task."""
    suite = discovery.find("suites", config.suite, Suite)()
    checkpoint = checkpoint_folder(config.policy.checkpoint)
    policy = discovery.find("policies", config.policy.name, Policy).load(checkpoint)
    assert config.policy.adapter is not None
    add_adapter(policy, config.policy.adapter, config.seed)
    grpo = config.recipe[0]
    assert isinstance(grpo, GRPO)
    task = suite.tasks[config.tasks.trained[0]]
    cast = Cast(config.suite, config.policy.name, checkpoint, config.seed)
    with closing(start_workers(config.workers, cast, policy.acting_weights())) as workers:
        trajectories = workers.collect(grpo.episodes((task,), ("bench", 0)))
    kept, _ = weighted_batch(policy, trajectories)
    played = sum(len(t.steps) for t in trajectories)
    full = len(trajectories) * -(-task.horizon // policy.chunk_steps)
    torch.set_num_threads(machine.cores())
    seconds = []
    for repeat in range(repeats):
        optimizer = build_optimizer(policy, Strategies(), grpo.optimizer)
        begun = time.perf_counter()
        grpo.update(policy, (task,), trajectories, Strategies(), optimizer, stream(0, "bench", repeat))
        seconds.append(time.perf_counter() - begun)
    update = statistics.median(seconds)
    return {
        "act_ms_per_decision": 1000 * _acting(type(policy).load(checkpoint), kept, config.workers.slots, repeats),
        "update_seconds": update,
        "updated_decisions_per_second": grpo.epochs * len(kept) / update,
        "decisions_to_the_horizon": full,
        "decisions_played": played,
        "decisions_trained_on": len(kept),
        "share_of_work_saved": 1 - len(kept) / full,
    }


def _acting(actor: Policy, batch: Batch, rows: int, repeats: int) -> float:
    """Seconds per decision on one thread, at the batch size of a worker; `actor` has no adapter, as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = np.resize(np.arange(len(batch)), rows)
    observation = batch.observation.take(chosen)
    seconds = []
    for repeat in range(repeats * 4):
        rng = [stream(0, "bench", repeat, row) for row in range(rows)]
        begun = time.perf_counter()
        actor.act(observation, 1.0, rng)
        seconds.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return statistics.median(seconds) / rows
