"""The optimiser of a stage: AdamW over the trainable parameters, grouped as the strategy wishes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.strategies.base import ParameterGroup
from perennial.strategies.composition import Strategies

MOST_ROWS = 256
"""Of a micro-batch that is chosen by the free memory."""


@dataclass(frozen=True)
class AdamWConfig:
    """How gradient steps are made.

    Attributes:
        learning_rate: of a parameter group with scale 1, reached after the warm-up.
        betas, eps, weight_decay: of AdamW.
        warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
        decay_steps: optimiser step, counted from the start, at which a cosine that begins after the warm-up has taken
            the learning rate to `final_learning_rate`, where it stays; 0 keeps it constant.
        final_learning_rate: see `decay_steps`.
        max_grad_norm: gradients are scaled down to this global norm.
        micro_batch: rows in one forward and backward pass; None takes as many as fit into the free memory, up to
            `MOST_ROWS`. Gradients add up to the same but for rounding.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset(
        {"weight_decay", "warmup_steps", "decay_steps", "final_learning_rate"}
    )
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 12
    decay_steps: int = 0
    final_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch: int | None = None

    @property
    def rows(self) -> int:
        """The micro-batch, or the most that it may become."""
        return self.micro_batch or MOST_ROWS

    def check(self) -> None:
        """See that the schedule makes sense.

        Raises:
            PerennialError: it does not.
        """
        if 0 < self.decay_steps <= self.warmup_steps:
            raise PerennialError(
                f"decay_steps is {self.decay_steps}, but the warm-up takes {self.warmup_steps} steps; "
                "let the learning rate decay later, or warm up for fewer steps."
            )
        if self.final_learning_rate > self.learning_rate:
            raise PerennialError(
                f"final_learning_rate is {self.final_learning_rate}, above the learning_rate {self.learning_rate}; "
                "lower it."
            )


def optimised(policy: Policy) -> dict[str, nn.Parameter]:
    """Everything that an optimiser moves, by name: what learns of the policy, and its value head if it has one.

    Strategies only see `policy.trainable()`: a value head judges the policy and is no part of it.
    """
    if policy.value_head is None:
        return policy.trainable()
    return policy.trainable() | dict(policy.value_head.named_parameters(prefix="value_head"))


def build_optimizer(
    policy: Policy, strategies: Strategies, config: AdamWConfig, value_rate: float = 1.0
) -> torch.optim.AdamW:
    """A fresh AdamW over `optimised(policy)`.

    Args:
        policy: what learns.
        strategies: group the parameters of the policy.
        config: how steps are made.
        value_rate: scale of the learning rate of the value head.

    Raises:
        PerennialError: nothing is trainable, or the strategy's groups do not cover the trainable parameters.
    """
    trainable = policy.trainable()
    groups = strategies.parameter_groups(policy) or (ParameterGroup(trainable),)
    covered = {name for group in groups for name in group.parameters}
    if not trainable or covered != set(trainable):
        missing = sorted(set(trainable) - covered)[:3]
        raise PerennialError(f"The optimiser has nothing to train or misses parameters such as {missing}.")
    head = {name: parameter for name, parameter in optimised(policy).items() if name not in trainable}
    return torch.optim.AdamW(
        [
            {"params": list(group.parameters.values()), "lr": 0.0, "scale": group.scale}
            for group in (*groups, ParameterGroup(head, value_rate))
            if group.parameters
        ],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: AdamWConfig) -> None:
    """Set every group's learning rate for the step about to be made, counted from the optimiser's own state."""
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * group["scale"] * height(config, steps)


def height(config: AdamWConfig, steps: int) -> float:
    """The learning rate of the step that follows `steps` steps, as a share of the highest."""
    if steps < config.warmup_steps or config.decay_steps == 0:
        return min(1.0, (steps + 1) / max(1, config.warmup_steps))
    progress = min(1.0, (steps - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps))
    final = config.final_learning_rate / config.learning_rate
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
