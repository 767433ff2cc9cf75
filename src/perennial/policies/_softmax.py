"""What the logits of a policy that chooses among bins say about its choices, and all of it from one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perennial.policies.base import Batch, Outputs, Policy


def log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of `batch.sample` at its temperature, [N, K], from raw logits [N, K, bins]."""
    return _chosen((logits / batch.temperature).log_softmax(-1), batch)


def imitation_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of `batch.sample` at temperature 1, [N], the mean over each row's unmasked tokens."""
    chosen = _chosen(logits.log_softmax(-1), batch)
    mask = torch.from_numpy(batch.mask).to(logits.device)
    return -(chosen * mask).sum(1) / mask.sum(1).clamp(min=1)


def _chosen(log_probs: Tensor, batch: Batch) -> Tensor:
    index = torch.from_numpy(batch.sample).to(log_probs.device)
    return log_probs.gather(-1, index[..., None]).squeeze(-1)


class OnePass(Outputs):
    """Outputs that are read from the same hidden states.

    Args:
        policy: whose they are.
        batch: what it looks at.
        states: the forward pass on a batch.
        head: raw logits [N, K, bins], read from what `states` gave.
        value: values [N], read from the same.
    """

    def __init__(
        self,
        policy: Policy,
        batch: Batch,
        states: Callable[[Batch], Any],
        head: Callable[[Any], Tensor],
        value: Callable[[Any], Tensor],
    ) -> None:
        super().__init__(policy, batch)
        self._states_of, self._head, self._value = states, head, value

    @cached_property
    def _states(self) -> Any:
        return self._states_of(self.batch)

    @cached_property
    def logits(self) -> Tensor:
        """See `Policy.logits`."""
        return self._head(self._states)

    @cached_property
    def log_prob(self) -> Tensor:
        """See `Policy.log_prob`."""
        return log_prob(self.logits, self.batch)

    @cached_property
    def imitation_loss(self) -> Tensor:
        """See `Policy.imitation_loss`."""
        return imitation_loss(self.logits, self.batch)

    @cached_property
    def value(self) -> Tensor:
        """See `Policy.value`."""
        return self._value(self._states)
