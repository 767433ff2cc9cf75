"""Merging whose coefficients are searched by playing, or one merge of all tasks into the base: RETAIN in full.

Yadav et al. 2025, arXiv 2512.08333. With one coefficient and a running chain it is `merge`, the shorter file to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.evaluation.race import Runner, race, winner
from perennial.merging.groups import Coefficients, grid
from perennial.policies._groups import GROUPS
from perennial.policies.base import Policy
from perennial.strategies._weights import between, between_groups, prefixed, restore, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class Retain(Strategy):
    """theta_n = (1 - alpha) theta_{n-1} + alpha theta_ft,n, by parameter group; task n is trained from theta_{n-1}.

    One value of alpha is a fixed coefficient. Several are searched after each task: each one's merged policy plays the
    same training states of a shifted variant, hopeless ones stop early (`evaluation.race`), and the one that succeeds
    most often is taken, the smallest of equals. Nothing is trained again. Differs from the paper, where alpha is chosen
    once, by hand, and their code, which has no search and no sequence.

    Adapters are averaged as products B A, exactly for the first task, later as near as the rank allows (see `merge`).

    Attributes:
        alpha: in [0, 1]; one value, or several to choose from.
        vision, language, action: the same for one group of parameters, where it differs; several make a grid.
        chain: "running" as above; "parallel" trains every task from the base and after each one merges the mean of all
            fine-tuned weights so far into the base, theta_n = (1 - alpha) theta_0 + alpha mean(theta_ft,1..n).
        variant: of the suite, in which alpha is searched; evaluate on another one.
        judged: the search plays the task just learned ("new") or all taught so far ("taught").
        episodes: most training states of each of these tasks that the search plays for one alpha; beyond those that
            the suite has it plays them again, which is no new evidence.
    """

    name: ClassVar[str] = "retain"
    alpha: tuple[float, ...] = (0.8,)
    vision: tuple[float, ...] = ()
    language: tuple[float, ...] = ()
    action: tuple[float, ...] = ()
    chain: Literal["running", "parallel"] = "running"
    variant: str = "ood_val"
    judged: Literal["new", "taught"] = "new"
    episodes: int = 40
    start: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    mean: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    chosen: dict[str, Coefficients] = field(init=False, repr=False, default_factory=dict)
    told: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for alpha in (*self.alpha, *self.vision, *self.language, *self.action):
            if not 0 <= alpha <= 1:
                raise PerennialError(f"retain weighs the fine-tuned weights by {alpha}; it must be between 0 and 1.")
        if not self.alpha:
            raise PerennialError("retain has no alpha; give one, or several to choose from, as 0.4,0.6,0.8.")
        if self.episodes < 1:
            raise PerennialError(f"retain searches with {self.episodes} episodes; it must be 1 or more.")

    @property
    def candidates(self) -> list[Coefficients]:
        """All that can be chosen, in ascending order; without a group of its own, alpha is common to the groups."""
        return grid(self.alpha, {group: getattr(self, group) for group in GROUPS})

    def variants(self) -> frozenset[str]:
        """The one to search in, where there is a choice."""
        return frozenset({self.variant} if len(self.candidates) > 1 else ())

    def ungated(self) -> str | None:
        """In parallel: what the gate turned down would come back with the next merge."""
        merged_again = "in a parallel chain it merges all fine-tuned weights again after every task"
        return merged_again if self.chain == "parallel" else super().ungated()

    def restarts(self) -> bool:
        """In parallel, from the base."""
        return self.chain == "parallel"

    def unjoined(self) -> str | None:
        """It goes by single tasks."""
        return "it would merge again for every one of them"

    def before_task(self, task: Task, policy: Policy) -> None:
        """Keep the weights that merging starts from; in parallel, learn from the base again."""
        if self.chain == "running" or not self.start:
            self.start = snapshot(policy)
        restore(policy, self.start)

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Merge, after a search where there is a choice."""
        learned = snapshot(policy)
        if self.chain == "parallel":
            self.mean = between(self.mean or learned, learned, lambda _: 1 / (len(self.chosen) + 1))
            learned = self.mean
        candidates, tried = self.candidates, list[Runner]()
        judged = [task.name] if self.judged == "new" else [*self.chosen, task.name]

        def take(number: int) -> None:
            restore(policy, between_groups(policy, self.start, learned, candidates[number]))

        def play(number: int, rounds: range) -> np.ndarray:
            take(number)
            played = [collect(len(rounds), name, self.variant, rounds.start) for name in judged]
            return np.array([[trajectory.success for trajectory in of_task] for of_task in played]).T

        if len(candidates) > 1:
            tried = race(len(candidates), play, self.episodes)
        best = winner(tried) if tried else 0
        take(best)
        self.chosen[task.name] = candidates[best]
        self.told = {
            "alpha": dict(zip(GROUPS, candidates[best], strict=True)),
            "tried": [_told(coefficients, runner) for coefficients, runner in zip(candidates, tried, strict=False)],
        }

    def account(self) -> Mapping[str, Any]:
        """The last `alpha` by group, and what was `tried`; `shares` tells what several in a row make of the weights."""
        return self.told

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that merging starts from, the mean of the fine-tuned ones, and the coefficients so far."""
        state = prefixed("start", self.start) | prefixed("mean", self.mean)
        for number, (task, coefficients) in enumerate(self.chosen.items()):
            state[f"chosen/{number:04d}/{task}"] = torch.tensor(coefficients, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.start = unprefixed("start", state, policy.device)
        self.mean = unprefixed("mean", state, policy.device)
        chosen = unprefixed("chosen", state)
        self.chosen = {name.partition("/")[2]: tuple(chosen[name].tolist()) for name in sorted(chosen)}  # type: ignore[misc]


def shares(chosen: Mapping[str, Sequence[float]], chain: str) -> dict[str, dict[str, float]]:
    """How much of the base ("base") and of every task's fine-tuning is in the weights, by parameter group.

    In a running chain each merge dilutes what was there: with a common alpha, (1 - alpha)^N of the base is left after
    N tasks. Shares of a group add up to 1.
    """
    found: dict[str, dict[str, float]] = {}
    for position, group in enumerate(GROUPS):
        of_group = {"base": 1.0}
        for task, coefficients in chosen.items():
            alpha = coefficients[position]
            if chain == "running":
                of_group = {name: (1 - alpha) * share for name, share in of_group.items()} | {task: alpha}
            else:
                seen = [name for name in of_group if name != "base"] + [task]
                of_group = {"base": 1 - alpha} | dict.fromkeys(seen, alpha / len(seen))
        found[group] = of_group
    return found


def _told(coefficients: Coefficients, runner: Runner) -> dict[str, Any]:
    return {
        "alpha": dict(zip(GROUPS, coefficients, strict=True)),
        "successes": int(runner.outcomes.sum()),
        "episodes": int(runner.outcomes.size),
        "dropped": runner.dropped,
    }
