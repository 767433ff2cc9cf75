"""Merging with a fixed coefficient, RETAIN at its simplest: a task ends at a mean of the weights before and after it.

Take `retain` to have the coefficient searched on a shifted scene, or to merge all tasks into the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.strategies._weights import between_groups, prefixed, restore, snapshot, unprefixed
from perennial.strategies.base import Collect, Strategy
from perennial.suites.base import Task


@dataclass
class Merge(Strategy):
    """theta_n = (1 - alpha) theta_{n-1} + alpha theta_ft,n; task n is trained from theta_{n-1} (arXiv 2512.08333).

    Exact when the weights themselves are trained, as in the paper. With an adapter the effective update B A is
    averaged, not its factors (which are not unique), and written back as the best adapter of the same rank: exact
    after the first task and whenever the average has that rank, otherwise its nearest approximation. The base stays
    as it is, so that every adapter folder remains a whole policy.

    The weight merge in the code of arXiv 2603.11653 (frozen weights W0 + c sum B_j A_j, a fresh adapter for every
    task, evaluated at scale c) is the same recursion with alpha = c, without the limit on the rank.

    Attributes:
        alpha: weight of the fine-tuned weights, in [0, 1].
        vision, language, action: the same for one group of parameters, where it differs.
    """

    name: ClassVar[str] = "merge"
    alpha: float = 0.5
    vision: float | None = None
    language: float | None = None
    action: float | None = None
    start: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for alpha in (self.alpha, self.vision, self.language, self.action):
            if alpha is not None and not 0 <= alpha <= 1:
                raise PerennialError(f"merge weighs the fine-tuned weights by {alpha}; it must be between 0 and 1.")

    def unjoined(self) -> str | None:
        """It goes by single tasks."""
        return "it would merge again for every one of them"

    def before_task(self, task: Task, policy: Policy) -> None:
        """Keep the weights that the task starts from."""
        self.start = snapshot(policy)

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Average, so that the next task starts from there."""
        own = (self.vision, self.language, self.action)
        vision, language, action = (self.alpha if alpha is None else alpha for alpha in own)
        restore(policy, between_groups(policy, self.start, snapshot(policy), (vision, language, action)))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that the present task started from."""
        return prefixed("start", self.start)

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.start = unprefixed("start", state, policy.device)
