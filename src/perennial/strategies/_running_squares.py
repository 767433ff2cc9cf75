"""Squares of the gradients that pass by during training, as some code takes them for a Fisher information."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from perennial.policies.base import Policy


class RunningSquares:
    """After every backward pass, adds the square of each parameter's gradient as it then stands.

    Gradients add up over the backward passes of one optimiser step, so partial sums are squared.

    Attributes:
        totals: sums of squares by parameter name.
        steps: optimiser steps seen.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.steps = 0
        self._handles: dict[str, RemovableHandle] = {}

    def watch(self, policy: Policy) -> None:
        """To be called before every backward pass."""
        trainable = policy.trainable()
        for name, parameter in trainable.items():
            if name not in self._handles:
                self._handles[name] = parameter.register_post_accumulate_grad_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
        self.steps += all(parameter.grad is None for parameter in trainable.values())

    def _add(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        square = parameter.grad.detach() ** 2
        self.totals[name] = self.totals[name] + square if name in self.totals else square

    def finish(self, ceiling: float) -> dict[str, Tensor]:
        """The totals per optimiser step, none above `ceiling`; stops watching and starts again from nothing."""
        means = {name: (total / max(1, self.steps)).clamp(max=ceiling) for name, total in self.totals.items()}
        for handle in self._handles.values():
            handle.remove()
        self.totals, self.steps, self._handles = {}, 0, {}
        return means
