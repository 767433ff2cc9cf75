"""Finds the best of several policies by playing the same initial states, and stops early with those shown to be worse.

After every few rounds a policy leaves the race when some other one is shown to be better by their paired differences.
The tests may be looked at any time (`evaluation.sequential`); each policy is tested against all others, each time at
the allowed error divided by their number, so the best one leaves with a chance of at most `ERROR`, whatever is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perennial.evaluation.sequential import is_above

Play = Callable[[int, range], np.ndarray]
"""Whether policy number n succeeded in these rounds: bool [rounds, tasks], the same states for every policy."""

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


def race(runners: int, play: Play, rounds: int, step: int = 5) -> list[Runner]:
    """Let `runners` policies play up to `rounds` rounds, `step` at a time; a round is one episode of every task."""
    running = list(range(runners))
    outcomes: list[list[np.ndarray]] = [[] for _ in running]
    for start in range(0, rounds, step):
        for number in running:
            outcomes[number].append(play(number, range(start, min(start + step, rounds))))
        so_far = {number: np.concatenate(outcomes[number]).astype(int) for number in running}
        running = [n for n in running if not any(_is_better(so_far[o], so_far[n], runners) for o in running if o != n)]
    return [Runner(np.concatenate(played), number not in running) for number, played in enumerate(outcomes)]


def winner(field: list[Runner]) -> int:
    """The number of the policy with the highest success rate among those that ran to the end; the first of equals."""
    rates = [-1.0 if runner.dropped else runner.rate for runner in field]
    return int(np.argmax(rates))


def _is_better(one: np.ndarray, other: np.ndarray, runners: int) -> bool:
    """Whether `one` is shown to succeed more often than `other`."""
    return is_above(one - other, 0.0, ERROR / (runners - 1))
