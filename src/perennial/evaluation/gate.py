"""The gate: a policy is carried on only as far as the tasks that it could do before did not suffer.

Old and new weights play the same initial states with the same random draws, a round of one pair of episodes for every
guarded task, until a test that may look after every block has decided. What the gate promises, for margins m (mean) and
M (single task) and the drop in success on the states it draws from:

- An update of which the mean drop is m or more is *shown to be safe* with a chance of at most alpha, over all scales of
  it that are tried. One within both margins is *shown to fall* with a chance of at most beta, for each scale.
- At the cap of `pairs` the measured drops decide. Nothing is promised there but the measurement: with n pairs and a
  share d of pairs with different outcomes, its standard error is about sqrt(d / n), so drops within twice that of the
  margin may go either way. Many small updates that each pass may add up to more than m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from perennial.errors import PerennialError
from perennial.evaluation.sequential import interval, is_above, is_below
from perennial.suites.base import Suite

BLOCK = 32
"""Pairs of episodes between two looks, at most, unless a round has more tasks."""

Play = Callable[[float, range], np.ndarray]
"""Plays rounds, by number, at a scale (0 are the old weights, 1 the new ones): successes, bool [rounds, tasks]."""


@dataclass(frozen=True)
class Gate:
    """How much may be forgotten with every task, in percentage points of success.

    Attributes:
        max_forgetting: m, by which the mean over the guarded tasks may fall; None opens the gate.
        max_task_forgetting: M, by which any one of them may fall; m where that is more.
        held_out: so many held-out tasks, the first ones, are guarded beside the tasks taught before.
        scales: of the update, which are tried from the largest to the smallest where the whole update does not pass.
        pairs: of episodes that are played for each scale at most; one for every guarded task always is.
        alpha: chance of showing that weights are safe although they forget m or more, all scales together.
        beta: chance of showing that weights fall although they do not, for each scale.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"held_out"})
    max_forgetting: float | None = None
    max_task_forgetting: float = 20.0
    held_out: int = 2
    scales: tuple[float, ...] = (0.75, 0.5, 0.25)
    pairs: int = 400
    alpha: float = 0.05
    beta: float = 0.05

    def check(self) -> None:
        """See that the numbers make sense together.

        Raises:
            PerennialError: one of them does not.
        """
        for name in ("max_forgetting", "max_task_forgetting"):
            points = getattr(self, name)
            if points is not None and not 0 < points < 100:
                raise PerennialError(f"--gate.{name} is {points}, but it must be above 0 and below 100 points.")
        for name in ("alpha", "beta"):
            error = getattr(self, name)
            if not 0 < error <= 0.5:
                raise PerennialError(f"--gate.{name} is {error}, but it must be above 0 and at most 0.5.")
        if not all(0 < scale < 1 for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise PerennialError(
                f"--gate.scales is {','.join(map(str, self.scales))}, but they must be above 0 and below 1, each once."
            )

    def limited(self, suite: Suite, tasks: Sequence[str]) -> Self:
        """The same gate with no more `pairs` than these guarded tasks have distinct training states together.

        From a state that was played before the pair would be no new evidence: it is the same again if greedy, and
        depends on the one before if sampled.
        """
        fewest = suite.fewest_states(tasks, "training")
        return self if fewest is None else replace(self, pairs=min(self.pairs, len(tasks) * fewest))

    def can_show(self) -> bool:
        """Whether an update under which nothing changes is shown to be safe within all `pairs`."""
        return is_below(np.zeros(self.pairs), self.margins[0], self.alpha / 2)

    @property
    def margins(self) -> tuple[float, float]:
        """Both margins, m and M, as shares in [0, 1]."""
        assert self.max_forgetting is not None
        return self.max_forgetting / 100, max(self.max_forgetting, self.max_task_forgetting) / 100


@dataclass(frozen=True)
class Trial:
    """One scale of an update and what was found about it; drops are in [-1, 1] and positive where success fell.

    Attributes:
        scale: 1 is the whole update.
        passed: it may be carried on.
        shown: by the test; otherwise the cap was reached and the measured drops decided.
        pairs: of episodes played.
        drop: mean over the guarded tasks, with its 95 % confidence sequence `low` to `high`.
        drops: of every guarded task, in order.
    """

    scale: float
    passed: bool
    shown: bool
    pairs: int
    drop: float
    low: float
    high: float
    drops: tuple[float, ...]


def judge(gate: Gate, tasks: int, play: Play) -> list[Trial]:
    """Try the whole update on `tasks` guarded tasks, then ever smaller scales, until one passes; none may."""
    block, rounds = max(1, BLOCK // tasks), max(1, gate.pairs // tasks)
    old = np.zeros((0, tasks), int)
    trials: list[Trial] = []
    for number, scale in enumerate((1.0, *sorted(gate.scales, reverse=True)), start=1):
        new, verdict = np.zeros((0, tasks), int), None
        while verdict is None:
            upto = min(len(new) + block, rounds)
            if len(old) < upto:  # what the old weights did is known for all scales
                old = np.concatenate([old, play(0.0, range(len(old), upto))])
            new = np.concatenate([new, play(scale, range(len(new), upto))])
            differences = old[:upto] - new
            verdict = decide(gate, differences, gate.alpha / 2**number, last=upto == rounds)
        low, high = interval(differences)
        drops = tuple(map(float, differences.mean(0)))
        trials.append(Trial(scale, *verdict, differences.size, float(differences.mean()), low, high, drops))
        if trials[-1].passed:
            break
    return trials


def decide(gate: Gate, differences: np.ndarray, alpha: float, last: bool) -> tuple[bool, bool] | None:
    """Whether an update passes and whether that is shown, or None while neither is clear.

    Args:
        gate: sets margins and beta, half of which goes to the mean and half to the single tasks.
        differences: success of the old weights minus that of the new ones, of -1, 0 and 1, [rounds, tasks].
        alpha: of this scale.
        last: nothing more can be played, so what was measured decides.
    """
    mean, single = gate.margins
    each = gate.beta / (2 * differences.shape[1])
    if is_above(differences, mean, gate.beta / 2) or any(is_above(task, single, each) for task in differences.T):
        return False, True
    within = bool((differences.mean(0) <= single).all())
    if within and is_below(differences, mean, alpha):
        return True, True
    return (within and bool(differences.mean() <= mean), False) if last else None
