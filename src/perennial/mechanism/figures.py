"""Measures a run: plays the base and scaled updates, and sets the weights after each task beside the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from perennial import discovery
from perennial.errors import PerennialError, unknown
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.evaluation.standalone import Actor, of_run
from perennial.evaluation.statistics import wilson
from perennial.mechanism import measures
from perennial.merging.linear import linear
from perennial.policies.base import Batch, Policy
from perennial.policies.lora import set_trainable
from perennial.reports.record import Record, read
from perennial.reports.summary import percent
from perennial.rollout.trajectory import Episode, to_batch
from perennial.rollout.workers import Workers, start_workers
from perennial.storage.run_folder import RunFolder
from perennial.strategies._fisher import fisher_diagonal
from perennial.strategies._weights import looking_through
from perennial.suites.base import Suite

DECISIONS = 64
"""Decisions of each task, evenly spread over its episodes, on which Fisher information and divergence are measured."""
ROWS = 16
"""Decisions that pass through the policy at once."""
EVERYTHING = "all"
"""Stands for all parameter groups together."""


@dataclass(frozen=True)
class Scope:
    """What of a run is measured.

    Attributes:
        done: phases that are learned.
        taught: tasks of these phases.
        held_out: tasks that are never taught.
        fisher: tasks whose rollouts give the Fisher information.
    """

    record: Record
    done: int
    taught: tuple[str, ...]
    held_out: tuple[str, ...]
    fisher: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that are played."""
        return self.taught + self.held_out


def scope(run: Path, tasks: Sequence[str]) -> Scope:
    """What of `run` can be measured; Fisher information is taken on `tasks`, by default on the held-out ones.

    Raises:
        PerennialError: it is no run, has learned nothing yet, or has no such task.
    """
    record = read(run)
    done = sum(not folder.name.startswith("00-") for folder in (run / "tasks").glob("[0-9]*-*"))  # 00 is the base
    if not done:
        raise PerennialError(f"{run} has not learned a task yet; continue it by `perennial resume {run}`.")
    taught = tuple(task for phase in record.phases[:done] for task in phase)
    for task in tasks:
        if task not in (*taught, *record.held_out):
            raise unknown("task that the run was taught or holds out", task, (*taught, *record.held_out))
    return Scope(record, done, taught, record.held_out, tuple(tasks) or record.held_out or taught)


def measure(chosen: Scope, scales: Sequence[float], episodes: int, progress: Progress) -> dict[str, Any]:
    """All figures of a run, for `mechanism.json`.

    The base policy plays `episodes` sampled evaluation episodes of each task at the run's temperature. `DECISIONS` of
    them a task are the states and actions on which Fisher information (on the tasks `chosen.fisher`, which count
    alike) and both divergences are taken, so both are over the states that the base visits.

    Args:
        chosen: from `scope`.
        scales: in [0, 1]; 0 is played in any case, as these are the base's episodes.
        episodes: of each task at each scale.
        progress: shows how far it has come.

    Returns:
        `run`, `preset`, `seed`, `finished`, `episodes`, `decisions`, `temperature`, the names of the `taught`,
        `held_out` and `fisher` tasks, and the parameter `groups`; `rows`, one for each phase that is learned, with
        `after`, `update` (by group, see `WeightUpdate`), `fisher` (by group, see `FisherEnergy`) and `kl` (None for a
        policy without logits), which has `taught`, `held_out` and `tasks`, each `{forward, reverse}`: the mean over
        executed tokens of KL(base || policy) and KL(policy || base) in nats; `scales`, with `scale`, `tasks` and the
        pooled `taught` and `held_out`, each `{value, low, high, n}` in percent with a Wilson interval.

    Raises:
        PerennialError: the policy has no log-probabilities.
    """
    config = chosen.record.config
    folder = RunFolder.open(chosen.record.folder)
    base = of_run(folder, 0, config["seed"])
    if not base.policy.can("log_prob"):
        raise PerennialError(
            f"The figures need log-probabilities, which the policy {base.cast.policy!r} does not have, as "
            f"{base.policy.missing['log_prob']}; measure a run of another policy."
        )
    set_trainable(base.policy)
    levels, batches = _play(chosen, base, of_run(folder, chosen.done, config["seed"]), scales, episodes, progress)
    fishers = [
        fisher_diagonal(base.policy, batches[task])
        for task in progress.track(chosen.fisher, description="Fisher information of the base")
    ]
    fisher = {name: torch.stack([one[name] for one in fishers]).mean(0) for name in fishers[0]}
    rows = [
        _row(chosen, row, base.policy, of_run(folder, row, config["seed"]), fisher, batches)
        for row in progress.track(range(1, chosen.done + 1), description="weights after each task")
    ]
    return {
        "run": chosen.record.name,
        "preset": chosen.record.run["preset"],
        "seed": config["seed"],
        "finished": chosen.done == len(chosen.record.phases),
        "episodes": episodes,
        "decisions": {task: len(batch) for task, batch in batches.items()},
        "temperature": config["evaluation"]["temperature"],
        "taught": list(chosen.taught),
        "held_out": list(chosen.held_out),
        "fisher": list(chosen.fisher),
        "groups": [group for group, names in base.policy.groups.items() if names],
        "rows": rows,
        "scales": levels,
    }


def _play(
    chosen: Scope, base: Actor, final: Actor, scales: Sequence[float], episodes: int, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Batch]]:
    """Success of base + scale * (final - base) on every task, and the base's decisions by task."""
    suite = discovery.find("suites", base.cast.suite, Suite)()
    temperature = chosen.record.config["evaluation"]["temperature"]
    weights = base.policy.acting_weights()
    levels, batches = [], {}
    ordered = sorted({0.0, *scales})
    with closing(start_workers(base.workers, base.cast, weights)) as workers:
        bar = progress.add_task("playing", total=len(ordered) * len(chosen.tasks))
        for scale in ordered:
            outcomes = {}
            for name in chosen.tasks:
                progress.update(bar, description=f"playing {name} at scale {scale:g}")
                task = suite.tasks[name]
                workers.broadcast(linear(weights, final.strategies.policy_for(task, final.policy), scale))
                asked = evaluation_episodes(suite, name, "id", episodes, temperature)
                outcomes[name], decisions = _episodes(workers, asked, scale == 0, base.policy)
                if decisions is not None:
                    batches[name] = decisions
                progress.advance(bar)
            levels.append({"scale": scale, **_rates(chosen, outcomes, suite)})
    return levels, batches


def _episodes(
    workers: Workers, asked: Sequence[Episode], keep: bool, policy: Policy
) -> tuple[list[bool], Batch | None]:
    """Outcomes of the evaluation episodes of a task, and some of their decisions if `keep`."""
    played = workers.collect([replace(episode, keep=keep) for episode in asked])
    decisions = None
    if keep:
        decisions = to_batch(played, policy.token_steps).spread(DECISIONS)
    return [trajectory.success for trajectory in played], decisions


def _rates(chosen: Scope, outcomes: Mapping[str, Sequence[bool]], suite: Suite) -> dict[str, Any]:
    """Rates with intervals: pooled over taught and over held-out tasks, and task by task."""

    def rate(tasks: Sequence[str]) -> dict[str, float] | None:
        pooled = [success for task in tasks for success in outcomes[task]]
        states = sum(min(suite.states(task, "evaluation") or math.inf, len(outcomes[task])) for task in tasks)
        return percent(wilson(sum(pooled), len(pooled), int(states))) if pooled else None

    tasks = {task: rate([task]) for task in chosen.tasks}
    return {"taught": rate(chosen.taught), "held_out": rate(chosen.held_out), "tasks": tasks}


def _row(
    chosen: Scope, row: int, base: Policy, actor: Actor, fisher: Mapping[str, Tensor], batches: Mapping[str, Batch]
) -> dict[str, Any]:
    """The figures of the policy after `row` phases."""
    before, after = base.acting_weights(), actor.policy.acting_weights()
    groups = {group: list(names) for group, names in base.groups.items() if names}
    groups[EVERYTHING] = [name for names in groups.values() for name in names]
    changed = measures.spectra(before, after)
    return {
        "after": chosen.record.row_names[row],
        "update": {g: asdict(measures.weight_update(before, after, changed, names)) for g, names in groups.items()},
        "fisher": {g: asdict(measures.fisher_energy(fisher, before, after, names)) for g, names in groups.items()},
        "kl": _divergences(chosen, base, actor, batches),
    }


def _divergences(chosen: Scope, base: Policy, actor: Actor, batches: Mapping[str, Batch]) -> dict[str, Any] | None:
    """Both divergences on the base's decisions: task by task, and their means over taught and held-out tasks."""
    if not base.can("logits"):
        return None
    suite = discovery.find("suites", actor.cast.suite, Suite)()
    found = {}
    for name, batch in batches.items():
        before = _logits(base, batch)
        with looking_through(base, actor.strategies.policy_for(suite.tasks[name], actor.policy)):
            after = _logits(base, batch)
        mask = torch.from_numpy(batch.mask).to(before.device)
        found[name] = {
            "forward": measures.divergence(before, after, mask, batch.temperature),
            "reverse": measures.divergence(after, before, mask, batch.temperature),
        }

    def mean(tasks: Sequence[str]) -> dict[str, float] | None:
        keys = ("forward", "reverse")
        return {key: float(np.mean([found[task][key] for task in tasks])) for key in keys} if tasks else None

    return {"taught": mean(chosen.taught), "held_out": mean(chosen.held_out), "tasks": found}


@torch.no_grad()
def _logits(policy: Policy, batch: Batch) -> Tensor:
    """`policy.logits`, a few rows at a time."""
    return torch.cat([policy.logits(part) for part in batch.parts(ROWS)])
