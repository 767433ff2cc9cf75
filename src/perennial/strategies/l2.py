"""L2 anchor: the squared distance to earlier weights is added to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.strategies._weights import prefixed, snapshot, unprefixed
from perennial.strategies.base import Strategy
from perennial.suites.base import Task


@dataclass
class L2(Strategy):
    """coefficient / 2 * sum (theta - theta*)^2 over the trainable parameters, from the first task on.

    The distance is taken between what is trained: with an adapter between its factors A and B, not between the
    products BA. It is the L2 baseline of Kirkpatrick et al. (arXiv 1612.00796), an EWC whose Fisher is one everywhere.

    Attributes:
        coefficient: at least 0.
        anchor: theta* are the weights at the start of the present task ("previous") or of the first one ("base").
    """

    name: ClassVar[str] = "l2"
    coefficient: float = 0.001
    anchor: Literal["previous", "base"] = "previous"
    anchored: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise PerennialError(f"l2.coefficient is {self.coefficient}; it must be at least 0.")

    def before_task(self, task: Task, policy: Policy) -> None:
        """Anchor to the weights that the task starts from."""
        if self.anchor == "previous" or not self.anchored:
            self.anchored = snapshot(policy)

    def penalty(self, policy: Policy) -> Tensor | None:
        """The distance to the anchor."""
        if self.coefficient == 0:
            return None
        trainable = policy.trainable().items()
        terms = [((parameter - self.anchored[n]) ** 2).sum() for n, parameter in trainable if n in self.anchored]
        return self.coefficient / 2 * torch.stack(terms).sum() if terms else None

    def state_dict(self) -> dict[str, Tensor]:
        """The anchor."""
        return prefixed("anchor", self.anchored)

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore the anchor."""
        self.anchored = unprefixed("anchor", state, policy.device)
