"""Dark experience replay: the logits of an earlier policy are matched on decisions kept from earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Outputs, Policy
from perennial.strategies._weights import looking_through, prefixed, snapshot, unprefixed
from perennial.strategies.base import ROWS
from perennial.strategies.replay import Replay
from perennial.suites.base import Task


@dataclass
class DarkReplay(Replay):
    """loss + coefficient * MSE(logits, kept logits) + label_coefficient * imitation loss, on kept decisions.

    DER (Buzzega et al., arXiv 2004.07211) with label_coefficient 0, DER++ with more; DER++ draws one batch for both
    terms here, where the paper draws two. The squared error is averaged over the executed tokens and their bins.
    Logits are those of the policy that was carried on after the decision's task.

    `variant="ut2026"` takes the logits of the policy before the first task instead, as the code of arXiv 2603.11653
    does: a distillation to the base. With a folder of demonstrations it also has that code's memory, see `Replay`.

    Attributes:
        label_coefficient: weight of the imitation loss, at least 0.
    """

    name: ClassVar[str] = "dark_replay"
    label_coefficient: float = 0.0
    base: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_coefficient < 0:
            raise PerennialError(f"dark_replay.label_coefficient is {self.label_coefficient}; it must be at least 0.")

    def requires(self) -> frozenset[str]:
        """Logits to match."""
        return frozenset({"logits"})

    def check(self, tasks: Sequence[str]) -> None:
        """Every task has been demonstrated, where demonstrations are replayed; for `ut2026` they need not be."""
        if self.demonstrations:
            super().check(tasks)

    def before_task(self, task: Task, policy: Policy) -> None:
        """Remember the base, where it is the teacher."""
        if self.variant == "ut2026" and not self.base:
            self.base = snapshot(policy)
        super().before_task(task, policy)

    def label(self, policy: Policy, batch: Batch) -> Batch:
        """`batch` with the teacher's logits."""
        with torch.no_grad(), looking_through(policy, self.base):
            logits = torch.cat([policy.logits(part).float().cpu() for part in batch.parts(ROWS)])
        return replace(batch, logits=logits.numpy())

    def coefficients(self) -> float:
        """Sum of the weights of what is replayed."""
        return self.strength + self.label_coefficient

    def replay_loss(self, outputs: Outputs, whole: Batch) -> Tensor:
        """The weighted squared error of the logits and, for DER++, the weighted imitation loss."""
        part, logits = outputs.batch, outputs.logits
        kept = torch.from_numpy(part.logits).to(logits.device)
        mask = torch.from_numpy(part.mask).to(logits.device)
        errors = ((logits - kept) ** 2).mean(-1)
        loss = self.strength * (errors * mask).sum() / max(1, int(whole.mask.sum()))
        if self.label_coefficient:
            loss = loss + self.label_coefficient * outputs.imitation_loss.sum() / len(whole)
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Every kept decision with its logits, and the base."""
        return prefixed("memory", super().state_dict()) | prefixed("base", self.base)

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(unprefixed("memory", state), policy)
        self.base = unprefixed("base", state, policy.device)
