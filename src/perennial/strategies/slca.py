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

    The slow learner of SLCA (Zhang et al., arXiv 2303.05118), which is all of it in the code of arXiv 2603.11653, whose
    4e-6 and 4e-5 are the defaults here at a recipe's 2e-5. The other half, for policies with a classifier of action
    bins, is the strategy `alignment`; list it too for the whole of SLCA.

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
