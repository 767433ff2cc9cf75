"""The diagonal of a policy's Fisher information, from the log-probabilities of what it does."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from perennial.policies.base import Batch, Policy
from perennial.randomness import stream
from perennial.strategies.base import ROWS


def fisher_diagonal(policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Mean over the rows of `batch` of the squared gradient of the log-probability of the executed tokens.

    With actions that were sampled from `policy` this estimates the diagonal of its Fisher information.
    """
    trainable = policy.trainable()
    total = {name: torch.zeros_like(parameter) for name, parameter in trainable.items()}
    for row in range(len(batch)):
        decision = batch.take(np.array([row]))
        log_prob = policy.log_prob(decision)
        executed = (log_prob * torch.from_numpy(decision.mask).to(log_prob.device)).sum()
        gradients = torch.autograd.grad(executed, list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2
    return {name: value / len(batch) for name, value in total.items()}


@torch.no_grad()
def drawn(policy: Policy, batch: Batch) -> Batch:
    """The observations of `batch` with choices that `policy` draws at temperature 1."""
    rng = iter([stream(0, "ewc", row) for row in range(len(batch))])
    chunks = [policy.act(part.observation, 1.0, list(islice(rng, len(part)))) for part in batch.parts(ROWS)]
    sample = np.concatenate([chunk.sample for chunk in chunks])
    return replace(batch, sample=sample, temperature=1.0, log_prob=None)
