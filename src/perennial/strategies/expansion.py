"""Dynamic weight expansion: every task has an adapter of its own, chosen by the task's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perennial.policies.base import Policy
from perennial.strategies._weights import looking_through, nested, prefixed, restore, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class Expansion(Strategy):
    """Each task is learned from the base, and acts with exactly the weights it was left with.

    Nothing is ever forgotten and nothing carries over (NBT and FWT are 0 by construction), which makes it a measure
    of what the other strategies gain by sharing; it has to be told the task. One adapter is kept per task; without an
    adapter, one whole policy.

    Attributes:
        held_out: what acts in tasks that have not been taught: the base, or the last adapter learned.
    """

    name: ClassVar[str] = "expansion"
    held_out: Literal["base", "last"] = "base"
    base: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(init=False, repr=False, default_factory=dict)
    learning: str | None = field(init=False, repr=False, default=None)

    def before_task(self, task: Task, policy: Policy) -> None:
        """Start from the base."""
        self.base = self.base or snapshot(policy)
        restore(policy, self.base)
        self.learning = task.name

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep what was learned."""
        self.adapters.pop(task.name, None)
        self.adapters[task.name] = snapshot(policy)
        self.learning = None

    def policy_for(self, task: Task, policy: Policy) -> Mapping[str, Tensor]:
        """The task's own weights."""
        if task.name == self.learning or not self.base:
            return policy.acting_weights()
        weights = self.adapters.get(task.name)
        if weights is None:
            weights = list(self.adapters.values())[-1] if self.held_out == "last" and self.adapters else self.base
        with looking_through(policy, weights):
            return policy.acting_weights()

    def state_dict(self) -> dict[str, Tensor]:
        """The base, every adapter in the order learned, and which task is being learned."""
        state = prefixed("base", self.base)
        for number, (task, adapter) in enumerate(self.adapters.items()):
            state |= prefixed(f"adapter/{number:04d}/{task}", adapter)
        return state | ({f"learning/{self.learning}": torch.ones(1)} if self.learning is not None else {})

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.base = unprefixed("base", state, policy.device)
        adapters = nested(unprefixed("adapter", state), policy.device)
        self.adapters = {name.partition("/")[2]: adapters[name] for name in sorted(adapters)}
        self.learning = next(iter(unprefixed("learning", state)), None)
