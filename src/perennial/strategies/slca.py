"""SLCA's slow learner: parts of the policy that carry general knowledge learn slowly, the action part fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.policies.lora import base_name
from perennial.strategies.base import ParameterGroup, Strategy


@dataclass
class SLCA(Strategy):
    """A learning rate for each group of parameters, as a multiple of the recipe's.

    The slow learner of SLCA (Zhang et al., arXiv 2303.05118), in the form that the code of arXiv 2603.11653 has:
    learning rates only, whose 4e-6 and 4e-5 are the defaults here at a recipe's 2e-5. The other half of SLCA is not
    implemented: it aligns the classifier after each task, on features drawn from a Gaussian stored for each class. A
    head that classifies action bins, as that of `openvla_oft`, could be aligned so. But there every task uses the same
    bins, so that classes do not belong to tasks, and other policies have no classifier.

    Attributes:
        vision, language, action: multiples of the recipe's learning rate, at least 0.
    """

    name: ClassVar[str] = "slca"
    vision: float = 0.2
    language: float = 0.2
    action: float = 2.0

    def __post_init__(self) -> None:
        scales = (self.vision, self.language, self.action)
        if min(scales) < 0:
            raise PerennialError(f"slca's learning rates are scaled by {scales}; each must be at least 0.")

    def parameter_groups(self, policy: Policy) -> Sequence[ParameterGroup]:
        """One group each for vision, language and action."""
        group_of = {name: group for group, names in policy.groups.items() for name in names}
        parameters: dict[str, dict[str, nn.Parameter]] = {group: {} for group in ("vision", "language", "action")}
        for name, parameter in policy.trainable().items():
            parameters[group_of[base_name(name)]][name] = parameter
        return [ParameterGroup(members, getattr(self, group)) for group, members in parameters.items()]
