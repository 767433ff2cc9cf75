"""SLCA's classifier alignment (Zhang et al., arXiv 2303.05118): features are remembered as Gaussians and seen again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from perennial.policies.base import Batch, Policy
from perennial.strategies.base import ROWS

TEMPERATURE = 0.1
"""Of the normalised logits, as in SLCA's code."""


@dataclass(frozen=True)
class Gaussians:
    """What the classifier read when it chose a bin in a task, for each of B bins.

    Attributes:
        counts: float32 [B], how often each was chosen.
        means: float32 [B, W], 0 for a bin that was never chosen.
        factor: float32 [W, W], whose product with its transpose is the covariance within a bin, the same for all.
    """

    counts: Tensor
    means: Tensor
    factor: Tensor

    def sample(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Features float32 [size, W] and their bins int64 [size], each bin as often as it was chosen."""
        share = self.counts.double().cpu().numpy()
        bins = torch.from_numpy(rng.choice(len(share), size, p=share / share.sum())).to(self.means.device)
        normal = torch.from_numpy(rng.standard_normal((size, len(self.factor)), dtype=np.float32)).to(self.means)
        return self.means[bins] + normal @ self.factor.T, bins

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def measure(policy: Policy, batch: Batch) -> Gaussians:
    """The Gaussians of the unmasked tokens of `batch`, which has at least one."""
    parts = list(batch.parts(ROWS))
    features = torch.cat([policy.features(part)[torch.from_numpy(part.mask)] for part in parts]).float()
    bins = torch.from_numpy(batch.sample[batch.mask]).to(features.device)
    counts = torch.bincount(bins, minlength=policy.bins).float()
    means = features.new_zeros(policy.bins, features.shape[1]).index_add(0, bins, features)
    means /= counts.clamp(min=1)[:, None]
    apart = (features - means[bins]).double()
    values, vectors = torch.linalg.eigh(apart.T @ apart / max(len(bins) - int((counts > 0).sum()), 1))
    return Gaussians(counts, means, (vectors * values.clamp(min=0).sqrt()).float().contiguous())


def align(
    policy: Policy, known: Mapping[str, Gaussians], rng: np.random.Generator, steps: int, size: int, rate: float
) -> None:
    """Train only the classifier, in `steps` steps of gradient descent, on features drawn from what is `known` of tasks.

    Args:
        policy: whose trainable parameters change, as far as `classify` reads them.
        known: by task, each of which gives the same number of the features.
        rng: draws them.
        steps: of gradient descent with momentum 0.9, at rates that fall to 0 along a cosine.
        size: features in a step.
        rate: at the first step.
    """
    classifier = _classifier(policy, next(iter(known.values())))
    optimizer = torch.optim.SGD(classifier, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        drawn = [known[task].sample(rng, -(-size // len(known))) for task in sorted(known)]
        logits = policy.classify(torch.cat([features for features, _ in drawn]))
        normalised = logits / (TEMPERATURE * logits.norm(dim=-1, keepdim=True).clamp(min=1e-7))
        loss = functional.cross_entropy(normalised, torch.cat([bins for _, bins in drawn]))
        for parameter, gradient in zip(classifier, torch.autograd.grad(loss, classifier), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _classifier(policy: Policy, known: Gaussians) -> Sequence[torch.nn.Parameter]:
    """The trainable parameters that `classify` reads."""
    learning = list(policy.trainable().values())
    slopes = torch.autograd.grad(policy.classify(known.means).sum(), learning, allow_unused=True)
    return [parameter for parameter, slope in zip(learning, slopes, strict=True) if slope is not None]
