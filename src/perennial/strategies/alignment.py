"""SLCA's classifier alignment: after each task the classifier of actions learns all tasks again, from Gaussians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from perennial.errors import PerennialError
from perennial.policies.base import Batch, Policy
from perennial.randomness import stream
from perennial.rollout.trajectory import to_batch
from perennial.strategies._weights import nested, prefixed
from perennial.strategies.base import ROWS, Collect, Strategy
from perennial.suites.base import Task

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
        share = self.counts.double().numpy()
        bins = torch.from_numpy(rng.choice(len(share), size, p=share / share.sum()))
        normal = torch.from_numpy(rng.standard_normal((size, len(self.factor)), dtype=np.float32))
        return self.means[bins] + normal @ self.factor.T, bins


@dataclass
class Alignment(Strategy):
    """The second half of SLCA (Zhang et al., arXiv 2303.05118), whose first is `slca`: list both for the whole of it.

    After every task but the first the classifier alone learns to tell the bins of all tasks apart, by cross-entropy of
    normalised logits, on features drawn from Gaussians that are remembered of the successful episodes of each task.

    SLCA's classes belong to one task each; here they are the bins of actions, which tasks share. So there is a Gaussian
    for each bin of each task, with one covariance for all bins of a task, many of which are seen only a few times, and
    bins are drawn as often as they were chosen. Differs from their code also in leaving out the weight decay, which
    would shrink an adapter, and the shrinking of earlier means by up to a tenth.

    Attributes:
        steps: gradient steps after a task. Theirs are five passes over 256 features of each class.
        batch_size: features in a step, as many of each task.
        learning_rate: at the first step; it falls to 0 along a cosine.
        episodes: played for a task's Gaussians, once to align and once more to remember. A task without success is not
            remembered, and after it nothing is aligned.
    """

    name: ClassVar[str] = "alignment"
    steps: int = 100
    batch_size: int = 256
    learning_rate: float = 0.01
    episodes: int = 32
    known: dict[str, Gaussians] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "episodes"):
            if getattr(self, name) <= 0:
                raise PerennialError(f"alignment.{name} is {getattr(self, name)}; it must be above 0.")

    def requires(self) -> frozenset[str]:
        """What it reads and trains."""
        return frozenset({"features", "classify"})

    def unjoined(self) -> str | None:
        """Only to earlier tasks can be aligned."""
        return "it aligns to earlier tasks, of which there are none"

    def unfit(self, before: Sequence[Strategy], after: Sequence[Strategy]) -> str | None:
        """One classifier has to serve all tasks, as it was aligned."""
        apart = [other.name for other in (*before, *after) if other.restarts()]
        if apart:
            return f"{apart[0]!r} begins every task at the base's classifier; leave one of them out"
        undone = [other.name for other in after if other.revises()]
        return f"{undone[0]!r} would change what it aligned; list it after {undone[0]!r}" if undone else None

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Align the classifier to this task and those before it."""
        earlier = {name: known for name, known in self.known.items() if name != task.name}
        now = self._measured(task, policy, collect) if earlier else {}
        if now:
            rng = stream(0, self.name, task.name)
            align(policy, earlier | now, rng, self.steps, self.batch_size, self.learning_rate)

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep the Gaussians of the weights that are carried on."""
        self.known.pop(task.name, None)
        self.known |= self._measured(task, policy, collect)

    def _measured(self, task: Task, policy: Policy, collect: Collect) -> dict[str, Gaussians]:
        """The Gaussians of fresh successful episodes by the task's name, if there is any success."""
        successes = [played for played in collect(self.episodes) if played.success]
        return {task.name: measure(policy, to_batch(successes, policy.token_steps))} if successes else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The Gaussians of every task."""
        states = [prefixed(task, vars(known)) for task, known in self.known.items()]
        return {key: value for state in states for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.known = {task: Gaussians(**tensors) for task, tensors in nested(state, torch.device("cpu")).items()}


@torch.no_grad()
def measure(policy: Policy, batch: Batch) -> Gaussians:
    """The Gaussians of the unmasked tokens of `batch`, which has at least one, on the CPU."""
    counts, sums, squares = (torch.zeros((), dtype=torch.float64, device=policy.device) for _ in range(3))
    for part in batch.parts(ROWS):
        features = policy.features(part)[torch.from_numpy(part.mask)].double()
        bins = torch.from_numpy(part.sample[part.mask]).to(features.device)
        counts = counts + torch.bincount(bins, minlength=policy.bins)
        sums = sums + features.new_zeros(policy.bins, features.shape[1]).index_add(0, bins, features)
        squares = squares + features.T @ features
    means = sums / counts.clamp(min=1)[:, None]
    freedom = (counts.sum() - (counts > 0).sum()).clamp(min=1)
    values, vectors = torch.linalg.eigh((squares - means.T @ sums) / freedom)
    found = counts, means, (vectors * values.clamp(min=0).sqrt()).contiguous()
    return Gaussians(*(tensor.float().cpu() for tensor in found))


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
    classifier = _classifier(policy, next(iter(known.values())).means)
    optimizer = torch.optim.SGD(classifier, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        drawn = [known[task].sample(rng, -(-size // len(known))) for task in sorted(known)]
        features, bins = (torch.cat(parts).to(policy.device) for parts in zip(*drawn, strict=True))
        logits = policy.classify(features)
        normalised = logits / (TEMPERATURE * logits.norm(dim=-1, keepdim=True).clamp(min=1e-7))
        loss = functional.cross_entropy(normalised, bins)
        for parameter, gradient in zip(classifier, torch.autograd.grad(loss, classifier), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _classifier(policy: Policy, features: Tensor) -> Sequence[nn.Parameter]:
    """The trainable parameters that `classify` reads."""
    learning = list(policy.trainable().values())
    slopes = torch.autograd.grad(policy.classify(features.to(policy.device)).sum(), learning, allow_unused=True)
    return [parameter for parameter, slope in zip(learning, slopes, strict=True) if slope is not None]
