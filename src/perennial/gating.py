"""Where the gate stands in a run: between the strategies' `after_task` and `remember`, before the task is saved."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial import faults
from perennial.config import Config
from perennial.evaluation.gate import Trial, judge
from perennial.policies._learned import learned_weights, read_learned_weights
from perennial.reports import words
from perennial.rollout.trajectory import Episode
from perennial.session import Session, label
from perennial.strategies._weights import between, looking_through, restore
from perennial.suites.base import Task

STATES = 1_000_000
"""Training states from here on belong to the gate, so many for every phase; nothing is taught on them if all differ."""


def keep_base(session: Session) -> None:
    """Keep the weights that the first task starts from, as the gate may go back to them."""
    if session.config.gate.max_forgetting is not None:
        session.folder.save_task(0, "base", session.write_learned)


def pass_gate(session: Session, phase: int) -> None:
    """Carry on the largest scale of the update of `phase` that the gate lets pass, or the weights before it.

    Everything here depends on the commit before and on the phase alone, so a run that is killed meanwhile judges again
    and comes to the same end.
    """
    config = session.config
    names = config.guarded(phase)
    if config.gate.max_forgetting is None or not names:
        return
    begun, steps = time.monotonic(), 0
    torch.set_num_threads(1)
    policy, tasks = session.policy, session.tasks(names)
    former = session.folder.task(phase, label(config.phases[phase - 1]) if phase else "base")
    before, after = read_learned_weights(policy, former), learned_weights(policy)

    @functools.lru_cache(2)  # the old weights and those on trial
    def weights(scale: float) -> dict[str, Tensor]:
        return between(before, after, lambda _: scale)

    def play(scale: float, rounds: range) -> np.ndarray:
        nonlocal steps
        session.display.begin(f"gate after {label(config.phases[phase])} (scale {scale:g})")
        with looking_through(policy, weights(scale)):
            session.workers.follow(policy)
            played = session.workers.collect(_episodes(config, phase, tasks, rounds))
        faults.point("gate")
        session.stop_if_asked()
        steps += sum(int(t.steps.sum()) for t in played)
        return np.array([t.success for t in played]).reshape(len(rounds), len(tasks))

    trials = judge(config.gate.limited(session.suite, names), len(tasks), play)
    kept = trials[-1].scale if trials[-1].passed else 0.0
    restore(policy, weights(kept))
    row = _row(config, phase, names, kept, trials)
    session.folder.log("metrics", row)
    seconds = {"evaluation_seconds": time.monotonic() - begun, "env_steps": steps}
    session.folder.log("timings", {"event": "gate", "task_index": phase + 1, **seconds})
    session.display.say("\n".join(words.gate(row)))


def _episodes(config: Config, phase: int, tasks: Sequence[Task], rounds: range) -> list[Episode]:
    """One episode of every task in every round, told in training words, by the decoder of the headline."""
    temperature = config.evaluation.temperature_of(config.evaluation.decoders[0])
    return [
        Episode(
            task=task.name,
            variant="id",
            split="training",
            initial_state=STATES * (phase + 1) + number,
            instruction=task.instructions[number % len(task.instructions)],
            temperature=temperature,
            key=("gate", phase, task.name, number),
            group=number,
            keep=False,
        )
        for number in rounds
        for task in tasks
    ]


def _row(config: Config, phase: int, names: Sequence[str], kept: float, trials: Sequence[Trial]) -> dict[str, Any]:
    """What the gate did, for the log and the reports; drops in percentage points."""
    told = []
    for trial in trials:
        points = {key: round(100 * getattr(trial, key), 9) for key in ("drop", "low", "high")}
        by_task = {name: round(100 * drop, 9) for name, drop in zip(names, trial.drops, strict=True)}
        told.append(asdict(trial) | points | {"drops": by_task})
    place = {"task": label(config.phases[phase]), "task_index": phase + 1}
    return {"event": "gate", **place, "max_forgetting": config.gate.max_forgetting, "kept": kept, "trials": told}
