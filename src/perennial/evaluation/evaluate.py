"""Which episodes make a cell of the success matrix."""

from __future__ import annotations

from collections.abc import Sequence

from perennial.rollout.trajectory import Episode
from perennial.suites.base import Suite


def includes_held_out(variant: str, variants: Sequence[str], where: str) -> bool:
    """Whether held-out tasks are evaluated in `variant`: in "all" of `variants`, or only in the "first"."""
    return where == "all" or variant == variants[0]


def episode_count(suite: Suite, task: str, variant: str, count: int, temperature: float) -> int:
    """How many of `count` evaluation episodes are played: a greedy one would be the same again from the same state."""
    states = suite.states(task, "evaluation", variant)
    return count if states is None or temperature else min(count, states)


def evaluation_episodes(suite: Suite, name: str, variant: str, count: int, temperature: float) -> list[Episode]:
    """Evaluation initial states 0 .. `count` - 1 of a task, told in its words of evaluation.

    Of a greedy policy, no more than there are distinct states, see `episode_count`. The random stream of an episode is
    named by its task and initial state alone, so every policy that is evaluated meets the same draws, which makes
    differences between policies sharper.
    """
    task = suite.tasks[name]
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
        for index in range(episode_count(suite, name, variant, count, temperature))
    ]
