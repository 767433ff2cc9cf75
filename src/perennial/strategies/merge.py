"""Merging with a fixed coefficient, RETAIN at its simplest: a task ends at a mean of the weights before and after it.

Take `retain` to have the coefficient searched on a shifted scene, or to merge all tasks into the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies._learned import learned_weights
from perennial.policies.base import Policy
from perennial.policies.lora import fold_adapter, is_wrapped
from perennial.randomness import integer_seed
from perennial.strategies._weights import between_groups, nested, prefixed, restore, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task

BESIDE_FRESH = ("sequential", "slca", "replay")
"""What keeps no weights of its own, which a fresh adapter would make those of another policy."""


@dataclass
class Merge(Strategy):
    """theta_n = (1 - alpha) theta_{n-1} + alpha theta_ft,n; task n is trained from theta_{n-1} (arXiv 2512.08333).

    Exact when the weights themselves are trained, as in the paper. With an adapter the effective update B A is
    averaged, not its factors (which are not unique), and written back as the best adapter of the same rank: exact
    after the first task and whenever the average has that rank, otherwise its nearest approximation. The base stays
    as it is, so that every adapter folder remains a whole policy.

    `variant="ut2026"` is the weight merge in the code of arXiv 2603.11653: a task begins with a fresh adapter on the
    weights W0 + c sum B_j A_j of the tasks before it, and acts with c B A at its end. That is the same recursion with
    alpha = c and no limit on the rank. The folder of an adapter then holds no more than the last task's part: the run
    is a whole policy, which `perennial evaluate` and `resume` know how to read. One adapter is kept per task, or, once
    they take half the room of the weights that they change, these weights. Without an adapter there is no difference.

    Attributes:
        alpha: weight of the fine-tuned weights, in [0, 1].
        vision, language, action: the same for one group of parameters, where it differs.
    """

    name: ClassVar[str] = "merge"
    alpha: float = 0.5
    vision: float | None = None
    language: float | None = None
    action: float | None = None
    variant: Literal["textbook", "ut2026"] = "textbook"
    start: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    weights: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    adapters: list[dict[str, Tensor]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        for alpha in (self.alpha, self.vision, self.language, self.action):
            if alpha is not None and not 0 <= alpha <= 1:
                raise PerennialError(f"merge weighs the fine-tuned weights by {alpha}; it must be between 0 and 1.")

    def unjoined(self) -> str | None:
        """It goes by single tasks."""
        return "it would merge again for every one of them"

    def unfit(self, before: Sequence[Strategy], after: Sequence[Strategy]) -> str | None:
        """A fresh adapter means nothing to those that keep an older one."""
        other = next((other.name for other in (*before, *after) if other.name not in BESIDE_FRESH), None)
        if other is None or self.variant == "textbook":
            return None
        return f"with ut2026 every task has a fresh adapter, and what {other!r} keeps may be of an older one"

    def ungated(self) -> str | None:
        """Nothing lies between two adapters of different weights."""
        fresh = "with ut2026 every task has a fresh adapter, of which no part leads back to the one before"
        return fresh if self.variant == "ut2026" else None

    def kept(self, task: Task, policy: Policy) -> dict[torch.device, int]:
        """For `ut2026`, the adapter."""
        adapter = policy.trainable().values() if self.variant == "ut2026" and is_wrapped(policy.model) else ()
        return {policy.device: sum(p.numel() * p.element_size() for p in adapter)}

    def before_task(self, task: Task, policy: Policy) -> None:
        """Keep the weights that the task starts from; for `ut2026` those are of a fresh adapter."""
        if self.variant == "ut2026" and is_wrapped(policy.model) and self.start:
            self._fold(task, policy)
        self.start = snapshot(policy)

    def _fold(self, task: Task, policy: Policy) -> None:
        """Make the adapter a part of the base, and keep what is needed to do so again."""
        self.adapters.append(learned_weights(policy))
        fold_adapter(policy, integer_seed(0, self.name, task.name))
        changed = {n: p.detach() for n, p in policy.model.named_parameters() if n.endswith(".base_layer.weight")}
        room = sum(weight.nbytes for weight in changed.values())
        if self.weights or 2 * sum(factor.nbytes for adapter in self.adapters for factor in adapter.values()) > room:
            self.weights, self.adapters = changed, []

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Average, so that the next task starts from there."""
        own = (self.vision, self.language, self.action)
        vision, language, action = (self.alpha if alpha is None else alpha for alpha in own)
        restore(policy, between_groups(policy, self.start, snapshot(policy), (vision, language, action)))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that the present task started from, and what became a part of the base before."""
        state = prefixed("start", self.start) | prefixed("weights", self.weights)
        for number, adapter in enumerate(self.adapters):
            state |= prefixed(f"adapter/{number:04d}", adapter)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave, also as a part of the base."""
        self.start = unprefixed("start", state, policy.device)
        self.weights = unprefixed("weights", state, policy.device)
        adapters = nested(unprefixed("adapter", state), policy.device)
        self.adapters = [adapters[number] for number in sorted(adapters)]
        if self.weights or self.adapters:
            self._fold_again(policy)

    def _fold_again(self, policy: Policy) -> None:
        """Make what was folded a part of the base that was just loaded; the adapter stays as it is."""
        present = learned_weights(policy)
        restore(policy, self.weights)
        for adapter in self.adapters:
            restore(policy, adapter)
            fold_adapter(policy, seed=0)
        restore(policy, present)
