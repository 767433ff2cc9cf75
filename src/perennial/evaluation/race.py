"""Finds the best of several policies by playing the same initial states, and stops early with those shown to be worse.

After every few rounds a policy leaves the race when some other one is shown to be better by their paired differences.
Where there are several objectives, each with tasks of its own, the other one must be shown to be better in one of them
and be no worse so far in the rest. The tests may be looked at any time (`evaluation.sequential`); each policy is tested
against all others in every objective, each time at the allowed error divided by the number of these tests, so the best
policy leaves with a chance of at most `ERROR`, whatever is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from perennial.evaluation.sequential import is_above

Play = Callable[[int, range], np.ndarray]
"""Whether policy number n succeeded in these rounds: bool [rounds, tasks], the same states for every policy."""

ALL = (slice(None),)
"""One objective that all tasks belong to."""

ERROR = 0.05
"""Chance that the best policy leaves the race."""


@dataclass(frozen=True)
class Runner:
    """One policy of a race.

    Attributes:
        outcomes: bool [rounds played, tasks].
        dropped: left the race before its end.
    """

    outcomes: np.ndarray
    dropped: bool = False

    @property
    def rate(self) -> float:
        """Share of successes, in [0, 1]."""
        return float(self.outcomes.mean())


def race(runners: int, play: Play, rounds: int, step: int = 5, objectives: Sequence[slice] = ALL) -> list[Runner]:
    """Let `runners` policies play up to `rounds` rounds, `step` at a time; a round is one episode of every task.

    Args:
        runners: how many policies.
        play: plays them.
        rounds: most rounds for each.
        step: rounds between two looks.
        objectives: the tasks of each objective, as a part of the columns of what `play` returns.
    """
    running = list(range(runners))
    outcomes: list[list[np.ndarray]] = [[] for _ in running]
    for start in range(0, rounds, step):
        for number in running:
            outcomes[number].append(play(number, range(start, min(start + step, rounds))))
        so_far = {number: np.concatenate(outcomes[number]).astype(int) for number in running}
        tests = (runners - 1) * len(objectives)
        running = [
            n for n in running if not any(_beats(so_far[o] - so_far[n], objectives, tests) for o in running if o != n)
        ]
    return [Runner(np.concatenate(played), number not in running) for number, played in enumerate(outcomes)]


def winner(field: Sequence[Runner], score: Callable[[Runner], float] = lambda runner: runner.rate) -> int:
    """The number of the policy with the highest score among those that ran to the end; the first of equals."""
    scores = [-np.inf if runner.dropped else score(runner) for runner in field]
    return int(np.argmax(scores))


def _beats(differences: np.ndarray, objectives: Sequence[slice], tests: int) -> bool:
    """Whether one policy is shown to be better than another one by outcomes [rounds, tasks] minus the other's."""
    parts = [differences[:, tasks] for tasks in objectives]
    return all(part.mean() >= 0 for part in parts) and any(is_above(part, 0.0, ERROR / tests) for part in parts)
