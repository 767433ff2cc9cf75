"""Which episodes make a cell of the success matrix."""

from __future__ import annotations

from collections.abc import Sequence

from perennial.rollout.trajectory import Episode
from perennial.suites.base import Task


def includes_held_out(variant: str, variants: Sequence[str], where: str) -> bool:
    """Whether held-out tasks are evaluated in `variant`: in "all" of `variants`, or only in the "first"."""
    return where == "all" or variant == variants[0]


def evaluation_episodes(task: Task, variant: str, count: int, temperature: float) -> list[Episode]:
    """Evaluation initial states 0 .. `count` - 1 of `task`, told in its words of evaluation.

    The random stream of an episode is named by its task and initial state alone, so every policy that is evaluated
    meets the same draws, which makes differences between policies sharper.
    """
    return [
        Episode(
            task=task.name,
            variant=variant,
            split="evaluation",
            initial_state=index,
            instruction=task.evaluation_instruction,
            temperature=temperature,
            key=("evaluate", task.name, variant, index),
            group=index,
            keep=False,
        )
        for index in range(count)
    ]
