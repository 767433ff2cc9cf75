"""What a strategy may do. A class with only a name is sequential fine-tuning; every hook is optional.

A strategy is a dataclass: its init fields are hyper-parameters, everything it remembers is in `field(init=False)` and
in `state_dict`. Strategies never know the objective and objectives never know the strategy, so every strategy works
under every objective. Nor do they know the run's seed: what they draw themselves is named by strategy and task and the
same in every run, so that intervals over seeds do not hold its variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.rollout.trajectory import Trajectory
from perennial.suites.base import Task

ROWS = 64
"""Decisions in one forward pass without gradient."""


class Collect(Protocol):
    """Plays episodes with today's policy, sampled, from training states; the same call plays the same episodes."""

    def __call__(self, count: int, task: str | None = None, variant: str = "id", first: int = 0) -> list[Trajectory]:
        """States `first` to `first + count - 1` of `task`, by default the one just learned."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: `scale` times the recipe's."""

    parameters: Mapping[str, nn.Parameter]
    scale: float = 1.0


@dataclass
class Strategy:
    """Sequential fine-tuning: learn each task and do nothing else.

    A task begins with `before_task` and is learned; then `after_task` may change the weights, the gate may take a part
    of that back, and `remember` looks at the weights that are carried on.

    Attributes:
        name: as it is chosen; every class needs one.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        """A class without a name could be neither chosen nor told apart."""
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            raise PerennialError(f'The strategy {cls.__qualname__} has no name; add name: ClassVar[str] = "...".')

    def requires(self) -> frozenset[str]:
        """Names of optional policy methods that this strategy calls, for example {"logits"}."""
        return frozenset()

    def variants(self) -> frozenset[str]:
        """Names of the suite's variants in which this strategy plays episodes, beside "id"."""
        return frozenset()

    def check(self, tasks: Sequence[str]) -> None:
        """See that what is needed from the disk to guard the tasks of these names is there, before a run starts.

        Raises:
            PerennialError: it is not.
        """

    def settled(self) -> Self:
        """The same strategy, with paths that do not depend on the present folder; nothing is remembered yet."""
        return self

    def restarts(self) -> bool:
        """Whether `before_task` sets the weights, so that a task does not begin where the one before ended.

        Such strategies begin a task before the others do, wherever they are listed.
        """
        return False

    def revises(self) -> bool:
        """Whether `after_task` changes the weights that a task was learned with."""
        return type(self).after_task is not Strategy.after_task

    def unfit(self, before: Sequence[Strategy], after: Sequence[Strategy]) -> str | None:
        """Why it cannot guard tasks beside those listed before and after it, and what to do; None if it can."""
        return None

    def ungated(self) -> str | None:
        """Why a gate cannot carry on a part of what a task changed, as the end of a sentence; None if it can."""
        return self._apart()

    def unjoined(self) -> str | None:
        """Why it cannot guard tasks that are learned all at once, as the end of a sentence; None if it can."""
        return self._apart()

    def _apart(self) -> str | None:
        """What separates the tasks, where the weights that act depend on them."""
        apart = type(self).policy_for is not Strategy.policy_for
        return "it gives tasks weights of their own" if apart else None

    def kept(self, task: Task, policy: Policy) -> Mapping[torch.device, int]:
        """Bytes that it keeps of `task`, by device: no less than this where it keeps all that it may."""
        return {}

    def before_task(self, task: Task, policy: Policy) -> None:
        """Called once before the first stage of `task`."""

    def parameter_groups(self, policy: Policy) -> Sequence[ParameterGroup] | None:
        """How the trainable parameters are grouped for the optimiser; None leaves them in one group."""
        return None

    def wants_all(self) -> bool:
        """Whether `batch_loss` is to see every decision of the rollouts, those without a learning signal too."""
        return False

    def penalty(self, policy: Policy) -> Tensor | None:
        """A scalar of the weights alone, added to the loss once per optimiser step; None adds nothing."""
        return None

    def batch_loss(self, outputs: Outputs, whole: Batch) -> Tensor | None:
        """What `outputs.batch`, a part of `whole`, adds to a scalar loss on what is learned from; None adds nothing.

        Called before the backward pass of each part. The parts of any partition add up to the loss, coefficient
        included: averages are over `whole`.
        """
        return None

    def replay(self, rng: np.random.Generator, size: int) -> Batch | None:
        """At most `size` rows of earlier tasks, to be mixed into an update on that many rows."""
        return None

    def replay_loss(self, outputs: Outputs, whole: Batch) -> Tensor:
        """What `outputs.batch`, a part of `whole`, adds to the scalar loss of the batch that `replay` gave.

        The parts of any partition add up to the loss, coefficient included: averages are over `whole`.
        """
        return outputs.imitation_loss.sum() / len(whole)

    def after_step(self, policy: Policy) -> None:
        """Called after every optimiser step."""

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Called once after the last stage of `task`, to change the weights: average, merge."""

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Called once with the weights that are carried on, after `after_task` of all and the gate.

        Here a Fisher is estimated and a buffer filled, so that nothing is kept of what the gate turned down.
        """

    def account(self) -> Mapping[str, Any]:
        """What the last `after_task` did that a reader of the report should know, as JSON; {} if nothing."""
        return {}

    def policy_for(self, task: Task, policy: Policy) -> Mapping[str, Tensor]:
        """The weights that act in `task`, by base parameter name."""
        return policy.acting_weights()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as flat named tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave; `policy` is already restored."""
