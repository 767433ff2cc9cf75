"""KL anchor: stay close to what an earlier policy would have done, in the states that are visited now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.strategies._weights import looking_through, prefixed, snapshot, unprefixed
from perennial.strategies.base import Strategy
from perennial.suites.base import Task


@dataclass
class KLAnchor(Strategy):
    """coefficient * mean over executed tokens of KL(teacher || policy), forward KL over the bins.

    The states are those of the batch that is being learned from: the policy's own rollouts under reinforcement
    learning, those without a learning signal too. Under imitation they are the demonstrations of the new task, and with
    anchor="previous" this is learning without forgetting (Li and Hoiem, arXiv 1606.09282). Both distributions are taken
    at the batch's temperature. The teacher costs a forward pass without gradient; only its trainable weights are kept.

    Attributes:
        coefficient: at least 0.
        anchor: the teacher is the policy at the start of the present task ("previous") or of the first one ("base").
    """

    name: ClassVar[str] = "kl_anchor"
    coefficient: float = 0.01
    anchor: Literal["previous", "base"] = "previous"
    teacher: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise PerennialError(f"kl_anchor.coefficient is {self.coefficient}; it must be at least 0.")

    def requires(self) -> frozenset[str]:
        """Bins to compare."""
        return frozenset({"logits"})

    def wants_all(self) -> bool:
        """Also states in which a group always succeeds: what the policy does well is to be kept."""
        return self.coefficient > 0

    def before_task(self, task: Task, policy: Policy) -> None:
        """Keep the weights that the task starts from as teacher."""
        if self.anchor == "previous" or not self.teacher:
            self.teacher = snapshot(policy)

    def batch_loss(self, outputs: Outputs, whole: Batch) -> Tensor | None:
        """The divergence on the rows of a part, over the tokens of `whole`."""
        if self.coefficient == 0 or not self.teacher:
            return None
        policy, part = outputs.policy, outputs.batch
        with torch.no_grad(), looking_through(policy, self.teacher):
            teacher = (policy.logits(part) / part.temperature).log_softmax(-1)
        student = (outputs.logits / part.temperature).log_softmax(-1)
        mask = torch.from_numpy(part.mask).to(student.device)
        # The last two terms add up to 0, and so do their gradients; they make the gradient exactly 0 at the teacher,
        # where Adam would make steps of rounding noise.
        divergence = (teacher.exp() * (teacher - student) + student.exp() - teacher.exp()).sum(-1)
        return self.coefficient * (divergence * mask).sum() / max(1, int(whole.mask.sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's weights."""
        return prefixed("teacher", self.teacher)

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore the teacher."""
        self.teacher = unprefixed("teacher", state, policy.device)
