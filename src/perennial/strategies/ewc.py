"""Elastic weight consolidation: weights that mattered for earlier tasks are held by a quadratic spring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from perennial.demonstrations.dataset import absolute, load, require_recorded, to_batch
from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.rollout import trajectory
from perennial.strategies._fisher import drawn, fisher_diagonal
from perennial.strategies._running_squares import RunningSquares
from perennial.strategies._weights import prefixed, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task

Tensors = dict[str, Tensor]


@dataclass
class EWC(Strategy):
    """Online EWC (Kirkpatrick et al., arXiv 1612.00796; Schwarz et al., arXiv 1805.06370) on what is trained.

    The penalty is coefficient / 2 * sum F (theta - theta*)^2 with theta* the weights that the present task starts
    from and F <- decay * F + F_task. F_task is the diagonal of the Fisher information of the policy just learned: the
    mean over decisions of the squared gradient of log pi(a|s), one decision at a time, where states and actions come
    from fresh rollouts of that policy and its weights stay fixed.

    `variant="ut2026"` is what the code of arXiv 2603.11653 does: the penalty has no 1/2 and every micro-batch carries
    its share of it; F is not decayed; F_task is taken from the gradients of the training itself (objective, penalty
    and replay, while the weights move): after every backward pass the running sum of the step's gradients so far is
    squared and added, the total is divided by the number of optimiser steps and clamped to 1e4. `episodes`, `decay`,
    `normalise` and, without `pretraining`, `samples` have no effect. It differs from that code in three ways: all of a
    task's updates count, not only its last epoch, because a strategy is not told which epoch is the last; a penalty of
    NaN ends the run instead of becoming 0; and parameters are never skipped.

    Attributes:
        coefficient: lambda, at least 0; none is 0.05, which suits the small policy, and for `ut2026` that code's 1e6.
        decay: gamma, weight of the earlier Fisher, in [0, 1].
        episodes: played after every task to estimate the Fisher.
        samples: decisions of these that are used, evenly spread.
        normalise: scale every task's Fisher to a mean of 1, so that tasks count alike.
        pretraining: folder of demonstrations that the base was made of; where it is given, what the base can do counts
            as an earlier task, whose Fisher is estimated on `samples` of their observations with actions of the base.
    """

    name: ClassVar[str] = "ewc"
    coefficient: float | None = None
    decay: float = 1.0
    episodes: int = 16
    samples: int = 128
    normalise: bool = False
    variant: Literal["textbook", "ut2026"] = "textbook"
    pretraining: str = ""
    fisher: Tensors = field(init=False, repr=False, default_factory=dict)
    anchor: Tensors = field(init=False, repr=False, default_factory=dict)
    squares: RunningSquares = field(init=False, repr=False, compare=False, default_factory=RunningSquares)

    def ungated(self) -> str | None:
        """With `ut2026` the Fisher is there before the gate judges."""
        trained = "with ut2026 its Fisher is that of the training, also of updates that the gate turns down"
        return trained if self.variant == "ut2026" else super().ungated()

    def requires(self) -> frozenset[str]:
        """Log-probabilities, for the Fisher information of the textbook and of the base."""
        return frozenset({"log_prob"} if self.variant == "textbook" or self.pretraining else ())

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise PerennialError(f"ewc.coefficient is {self.strength}; it must be at least 0.")
        if not 0 <= self.decay <= 1:
            raise PerennialError(f"ewc.decay is {self.decay}; it must be between 0 and 1.")
        if min(self.episodes, self.samples) < 1:
            raise PerennialError("ewc.episodes and ewc.samples must be at least 1.")

    @property
    def strength(self) -> float:
        """The coefficient given, or that of the variant."""
        default = 1e6 if self.variant == "ut2026" else 0.05
        return default if self.coefficient is None else self.coefficient

    def unfit(self, before: Sequence[Strategy], after: Sequence[Strategy]) -> str | None:
        """Its springs hold the weights where they were measured, or near."""
        other = next((other.name for other in (*before, *after) if other.restarts()), None)
        measured = f"{other!r} begins every task at the base, far from where the Fisher information was measured"
        return None if other is None else f"{measured}; leave one of them out"

    def unjoined(self) -> str | None:
        """Only the base can be held while the first tasks are learned."""
        return (
            None
            if self.pretraining
            else "it holds what earlier tasks need, of which there are none without ewc.pretraining"
        )

    def check(self, tasks: Sequence[str]) -> None:
        """The folder that the base was made of holds demonstrations."""
        if self.pretraining:
            require_recorded(self.pretraining, "strategies.ewc.pretraining")

    def settled(self) -> Self:
        """The same strategy, with the folder of demonstrations as an absolute path."""
        return replace(self, pretraining=absolute(self.pretraining))

    def before_task(self, task: Task, policy: Policy) -> None:
        """Anchor to the weights that the task starts from."""
        if self.pretraining and not self.fisher:
            shown = to_batch(load(Path(self.pretraining)), policy)
            self._add(fisher_diagonal(policy, drawn(policy, shown.spread(self.samples))), self.decay)
        self.anchor = snapshot(policy) if self.fisher else {}

    def penalty(self, policy: Policy) -> Tensor | None:
        """The energy of the textbook's springs."""
        return self._energy(policy, 0.5) if self.variant == "textbook" else None

    def batch_loss(self, outputs: Outputs, whole: Batch) -> Tensor | None:
        """For `ut2026` the share of the spring energy that the part carries."""
        if self.variant == "textbook":
            return None
        self.squares.watch(outputs.policy)
        energy = self._energy(outputs.policy, 1.0)
        return None if energy is None else energy * (len(outputs.batch) / len(whole))

    def _energy(self, policy: Policy, factor: float) -> Tensor | None:
        """The spring energy, coefficient * factor * sum F (theta - theta*)^2; None where nothing is held."""
        terms = [
            (self.fisher[name] * (parameter - self.anchor[name]) ** 2).sum()
            for name, parameter in policy.trainable().items()
            if name in self.fisher and name in self.anchor
        ]
        if self.strength == 0 or not terms:
            return None
        return self.strength * factor * torch.stack(terms).sum()

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Add the task's Fisher."""
        if self.variant == "ut2026":
            self._add(self.squares.finish(ceiling=1e4), 1.0)
        else:
            played = trajectory.to_batch(collect(self.episodes), policy.token_steps)
            self._add(fisher_diagonal(policy, played.spread(self.samples)), self.decay)

    def _add(self, fisher: Tensors, decay: float) -> None:
        """Let what is known so far decay, and add another task's Fisher."""
        if self.normalise and self.variant == "textbook":
            mean = torch.cat([value.flatten() for value in fisher.values()]).mean().clamp(min=1e-30)
            fisher = {name: value / mean for name, value in fisher.items()}
        for name, value in fisher.items():
            self.fisher[name] = decay * self.fisher[name] + value if name in self.fisher else value

    def state_dict(self) -> Tensors:
        """Fisher and anchor, and for `ut2026` the squares collected so far in the present task."""
        state = prefixed("fisher", self.fisher) | prefixed("anchor", self.anchor)
        return state | prefixed("squares", self.squares.totals) | {"steps": torch.tensor(self.squares.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.fisher = unprefixed("fisher", state, policy.device)
        self.anchor = unprefixed("anchor", state, policy.device)
        self.squares.totals = unprefixed("squares", state, policy.device)
        self.squares.steps = int(state["steps"])
