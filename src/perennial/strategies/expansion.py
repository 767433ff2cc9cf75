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

    Nothing is ever forgotten and nothing carries over (NBT is 0 by construction, and FWT where the base acts in tasks
    not yet taught), which makes it a measure of what the other strategies gain by sharing; it has to be told the task.
    One adapter is kept per task; without an adapter, one whole policy.

    Attributes:
        held_out: what acts in tasks that have not been taught: the base, the last adapter learned, or the one whose
            task sounds most alike ("nearest": its first instruction shares the largest part of its words with that of
            the task, the earlier one of equals; the base where no word is shared).
    """

    name: ClassVar[str] = "expansion"
    held_out: Literal["base", "last", "nearest"] = "base"
    base: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(init=False, repr=False, default_factory=dict)
    instructions: dict[str, str] = field(init=False, repr=False, default_factory=dict)
    learning: str | None = field(init=False, repr=False, default=None)

    def kept(self, task: Task, policy: Policy) -> dict[torch.device, int]:
        """What learns."""
        return {policy.device: sum(p.numel() * p.element_size() for p in policy.trainable().values())}

    def restarts(self) -> bool:
        """From the base."""
        return True

    def before_task(self, task: Task, policy: Policy) -> None:
        """Start from the base."""
        self.base = self.base or snapshot(policy)
        restore(policy, self.base)
        self.learning = task.name

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep what was learned."""
        self.adapters.pop(task.name, None)
        self.adapters[task.name] = snapshot(policy)
        self.instructions[task.name] = task.instructions[0]
        self.learning = None

    def policy_for(self, task: Task, policy: Policy) -> Mapping[str, Tensor]:
        """The task's own weights."""
        if task.name == self.learning or not self.base:
            return policy.acting_weights()
        chosen = task.name if task.name in self.adapters else self._stand_in(task)
        with looking_through(policy, self.base if chosen is None else self.adapters[chosen]):
            return policy.acting_weights()

    def _stand_in(self, task: Task) -> str | None:
        """The task whose adapter acts in an untaught one; None is the base."""
        if self.held_out == "base" or not self.adapters:
            return None
        if self.held_out == "last":
            return list(self.adapters)[-1]
        likeness = {name: _likeness(task.instructions[0], self.instructions[name]) for name in self.adapters}
        nearest = max(likeness, key=likeness.__getitem__)
        return nearest if likeness[nearest] else None

    def state_dict(self) -> dict[str, Tensor]:
        """The base, every adapter in the order learned, and which task is being learned."""
        state = prefixed("base", self.base)
        for number, (task, adapter) in enumerate(self.adapters.items()):
            state |= prefixed(f"adapter/{number:04d}/{task}", adapter)
        for task, text in self.instructions.items():
            state[f"instruction/{task}"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return state | ({f"learning/{self.learning}": torch.ones(1)} if self.learning is not None else {})

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.base = unprefixed("base", state, policy.device)
        adapters = nested(unprefixed("adapter", state), policy.device)
        self.adapters = {name.partition("/")[2]: adapters[name] for name in sorted(adapters)}
        spoken = unprefixed("instruction", state)
        self.instructions = {task: bytes(text.numpy()).decode() for task, text in spoken.items()}
        self.learning = next(iter(unprefixed("learning", state)), None)


def _likeness(one: str, other: str) -> float:
    """The share of their words that two sentences have in common, in [0, 1] (Jaccard index)."""
    words, others = set(one.lower().split()), set(other.lower().split())
    return len(words & others) / len(words | others)
