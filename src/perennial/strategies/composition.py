"""Several strategies acting as one; with none of them this is sequential fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.strategies.base import Collect, ParameterGroup, Strategy
from perennial.suites.base import Task


@dataclass(frozen=True)
class Strategies:
    """What the training loop talks to. Penalties and replay losses add up; groups and adapters have one owner.

    A task is begun first by members that set the weights which it starts from, so that the others see these. It is
    ended in the order of the list, later ones going on with what earlier ones made, and remembered when it has ended.
    """

    members: tuple[Strategy, ...] = ()

    def before_task(self, task: Task, policy: Policy) -> None:
        """See `Strategy.before_task`."""
        for member in sorted(self.members, key=lambda member: not member.restarts()):
            member.before_task(task, policy)

    def parameter_groups(self, policy: Policy) -> Sequence[ParameterGroup] | None:
        """The groups of the one strategy that sets them.

        Raises:
            PerennialError: two strategies set parameter groups.
        """
        grouped = [(m.name, groups) for m in self.members if (groups := m.parameter_groups(policy)) is not None]
        if len(grouped) > 1:
            raise PerennialError(
                f"The strategies {grouped[0][0]!r} and {grouped[1][0]!r} both set learning rates; keep one of them."
            )
        return grouped[0][1] if grouped else None

    def wants_all(self) -> bool:
        """Whether a member does, see `Strategy.wants_all`."""
        return any(member.wants_all() for member in self.members)

    def batch_loss(self, outputs: Outputs, whole: Batch) -> Tensor | None:
        """The sum of what the members add for a part of `whole`; None if nothing."""
        losses = [loss for m in self.members if (loss := m.batch_loss(outputs, whole)) is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def losses_beside(self, policy: Policy, rng: np.random.Generator, size: int, micro_batch: int) -> Iterator[Tensor]:
        """The members' penalties and the losses of what they replay beside an update on `size` rows, to be added up.

        What is replayed comes `micro_batch` rows at a time; back-propagate each loss before asking for the next one,
        to save memory.
        """
        for member in self.members:
            penalty = member.penalty(policy)
            if penalty is not None:
                yield penalty
        for member in self.members:
            whole = member.replay(rng, size)
            if whole is not None:
                yield from (member.replay_loss(policy.outputs(part), whole) for part in whole.parts(micro_batch))

    def after_step(self, policy: Policy) -> None:
        """See `Strategy.after_step`."""
        for member in self.members:
            member.after_step(policy)

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """See `Strategy.after_task`."""
        for member in self.members:
            member.after_task(task, policy, collect)

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """See `Strategy.remember`."""
        for member in self.members:
            member.remember(task, policy, collect)

    def accounts(self) -> dict[str, Mapping[str, Any]]:
        """What each member did after the last task, by its name, where there is something to tell."""
        return {member.name: account for member in self.members if (account := member.account())}

    def policy_for(self, task: Task, policy: Policy) -> Mapping[str, Tensor]:
        """The weights that act in `task`: those of the first member with an opinion, else today's."""
        return policy.acting_weights() if self.chooser is None else self.chooser.policy_for(task, policy)

    @property
    def chooser(self) -> Strategy | None:
        """The first member that chooses the weights that act."""
        chosen = (member for member in self.members if type(member).policy_for is not Strategy.policy_for)
        return next(chosen, None)

    def state_dict(self) -> dict[str, Tensor]:
        """The members' states under their position and name."""
        return {
            f"{position}.{member.name}.{key}": value
            for position, member in enumerate(self.members)
            for key, value in member.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        for position, member in enumerate(self.members):
            prefix = f"{position}.{member.name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            member.load_state_dict(own, policy)
