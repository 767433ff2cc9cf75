"""Plays the evaluation episodes of one cell of the success matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from perennial.rollout.collect import OnEpisode
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.rollout.workers import Workers
from perennial.suites.base import Task


@dataclass(frozen=True)
class Cell:
    """One cell: which policy (row), decoder, variant and task."""

    row: int
    decoder: str
    variant: str
    task: str


def evaluate(
    cell: Cell,
    task: Task,
    weights: Mapping[str, Tensor],
    workers: Workers,
    episodes: int,
    temperature: float,
    on_episode: OnEpisode,
) -> list[Trajectory]:
    """Play evaluation initial states 0 .. `episodes` - 1 of `task` with `weights` and the unseen instruction.

    Every row draws the same random numbers for the same initial state, which makes differences between rows sharper.
    """
    workers.broadcast(weights)
    return workers.collect(
        [_episode(cell, task, index, temperature) for index in range(episodes)], on_episode
    )


def film(task: Task, weights: Mapping[str, Tensor], workers: Workers, size: int) -> Trajectory:
    """Play evaluation state 0 greedily and record frames of `size` pixels."""
    workers.broadcast(weights)
    cell = Cell(0, "greedy", "id", task.name)
    return workers.collect([_episode(cell, task, 0, 0.0, size)], lambda steps, success: None)[0]


def _episode(cell: Cell, task: Task, index: int, temperature: float, film: int = 0) -> Episode:
    return Episode(
        task=task.name,
        variant=cell.variant,
        split="evaluation",
        initial_state=index,
        instruction=task.evaluation_instruction,
        temperature=0.0 if cell.decoder == "greedy" else temperature,
        key=("evaluate", task.name, cell.variant, index),
        keep=False,
        film=film,
    )
