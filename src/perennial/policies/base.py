"""The words of a policy: observation, action chunk, batch, and what every policy can do.

Shapes: N rows, V camera views, S state numbers, K tokens per decision, C environment steps per chunk, H those that a
demonstration looks ahead, D action numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from perennial.policies._anatomy import Anatomy


@dataclass(frozen=True)
class Observation:
    """What a policy sees, N at a time.

    Attributes:
        images: uint8 [N, V, H, W, 3].
        instructions: N sentences.
        states: float32 [N, S], proprioception in the suite's own units.
    """

    images: np.ndarray
    instructions: tuple[str, ...]
    states: np.ndarray

    def __len__(self) -> int:
        return len(self.instructions)

    def take(self, rows: np.ndarray) -> Observation:
        """The given rows."""
        return Observation(self.images[rows], tuple(self.instructions[i] for i in rows), self.states[rows])


@dataclass(frozen=True)
class ActionChunk:
    """What a policy decides, N at a time.

    Attributes:
        actions: float32 [N, C, D], environment units, executed open loop.
        sample: int64 [N, K] tokens, or whatever else `log_prob` needs to know which choice was made ([N, ...]).
        log_prob: float32 [N, K], of `sample` at the sampling temperature (0 when greedy).
    """

    actions: np.ndarray
    sample: np.ndarray
    log_prob: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What a learner looks at: N chunk decisions, from rollouts or from demonstrations.

    Attributes:
        observation: N observations.
        sample: [N, ...] the choices, see `ActionChunk.sample`.
        mask: bool [N, K]; False for tokens whose actions were never executed: the episode had ended, or only C are.
        temperature: at which `sample` was drawn; 1 for demonstrations.
        log_prob: float32 [N, K] of acting, where the rows come from rollouts.
        advantage: float32 [N], where known.
        target: float32 [N], what the value head should say, where known.
        weight: float32 [N, K], the weight of each token in the loss, 0 where masked.
        logits: float32 [N, K, bins], stored teacher logits, where a strategy keeps them.
    """

    observation: Observation
    sample: np.ndarray
    mask: np.ndarray
    temperature: float = 1.0
    log_prob: np.ndarray | None = None
    advantage: np.ndarray | None = None
    target: np.ndarray | None = None
    weight: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.observation)

    def take(self, rows: np.ndarray) -> Batch:
        """The given rows of every field."""
        arrays = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("observation", "temperature") and getattr(self, f.name) is not None
        }
        return replace(self, observation=self.observation.take(rows), **arrays)

    def spread(self, count: int) -> Batch:
        """Up to `count` rows, evenly spread."""
        return self.take(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))

    def parts(self, size: int) -> Iterator[Batch]:
        """All rows in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """All rows in order; of the optional fields only the logits are kept, if all have them."""
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return Batch(
        observation=Observation(
            np.concatenate([batch.observation.images for batch in batches]),
            tuple(sentence for batch in batches for sentence in batch.observation.instructions),
            np.concatenate([batch.observation.states for batch in batches]),
        ),
        sample=np.concatenate([batch.sample for batch in batches]),
        mask=np.concatenate([batch.mask for batch in batches]),
        logits=np.concatenate(logits) if len(logits) == len(batches) else None,
    )


class Outputs:
    """What a policy says about a batch: its methods of the same names, each called once, when it is first asked for.

    An objective and the strategies beside it read the same outputs, so that none of them repeats a forward pass.
    """

    def __init__(self, policy: Policy, batch: Batch) -> None:
        self.policy = policy
        self.batch = batch

    @cached_property
    def log_prob(self) -> Tensor:
        """See `Policy.log_prob`."""
        return self.policy.log_prob(self.batch)

    @cached_property
    def imitation_loss(self) -> Tensor:
        """See `Policy.imitation_loss`."""
        return self.policy.imitation_loss(self.batch)

    @cached_property
    def logits(self) -> Tensor:
        """See `Policy.logits`."""
        return self.policy.logits(self.batch)

    @cached_property
    def value(self) -> Tensor:
        """See `Policy.value`."""
        return self.policy.value(self.batch)


class Policy(ABC):
    """A vision-language-action policy that owns its processor: images and words in, environment actions out.

    Attributes:
        missing: methods that the policy cannot have, and why, as the end of a sentence.
        model: the torch module that learns; wrapped by PEFT once `add_adapter` was called.
        value_head: judges states for an objective that needs it, once `add_value_head` was called. It is no part of
            `model`: it never acts, it is in no group, and no strategy sees it.
        groups: "vision" | "language" | "action" -> names of the base parameters; every parameter is in exactly one.
        chunk_steps: C, environment steps per decision.
        token_steps: int [K], the step at which each token starts to act, below H; from C on none ever acts.
        image_size: side of the square images it wants, in pixels.
        bins: that each token chooses among, where it has `logits`.
    """

    name: ClassVar[str]
    missing: ClassVar[Mapping[str, str]] = {}
    model: nn.Module
    value_head: nn.Module | None = None
    groups: Mapping[str, Sequence[str]]
    chunk_steps: int
    token_steps: np.ndarray
    image_size: int
    bins: int = 0

    @abstractmethod
    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """Decide for every row.

        Row i draws only from `rng[i]`, so its choice does not depend on which rows share the batch. Temperature 0 is
        greedy decoding and draws nothing.
        """

    @abstractmethod
    def log_prob(self, batch: Batch) -> Tensor:
        """Log-probability of `batch.sample` at `batch.temperature`, float32 [N, K], differentiable."""

    @abstractmethod
    def imitation_loss(self, batch: Batch) -> Tensor:
        """Loss of imitating `batch.sample`, float32 [N], the mean over each row's unmasked tokens, differentiable."""

    @abstractmethod
    def encode(self, actions: np.ndarray) -> np.ndarray:
        """The sample that stands for `actions` [N, H, D]: the inverse of acting, up to discretisation.

        Of C actions, where H is more, the last is repeated.
        """

    @property
    def imitated_steps(self) -> int:
        """H, environment steps that a demonstration shows of each decision: C, or more where not all are executed."""
        return self.chunk_steps

    @classmethod
    def can(cls, method: str) -> bool:
        """Whether a policy of this class has `method`, one of those that not every policy has."""
        return method not in cls.missing and getattr(cls, method) is not getattr(Policy, method)

    def logits(self, batch: Batch) -> Tensor:
        """Raw logits at temperature 1, float32 [N, K, bins], for policies that choose among bins.

        `batch.sample` [N, K] holds the bins chosen, and `log_prob` and `imitation_loss` are those of a softmax.
        """
        raise NotImplementedError(f"{self.name} has no logits")

    def features(self, batch: Batch) -> Tensor:
        """What `classify` reads for each token, [N, K, width], for policies with a classifier of bins."""
        raise NotImplementedError(f"{self.name} has no classifier")

    def classify(self, features: Tensor) -> Tensor:
        """Raw logits float32 [..., bins] of `features` [..., width]; `logits` are those of the batch's features."""
        raise NotImplementedError(f"{self.name} has no classifier")

    def add_value_head(self, seed: int) -> None:
        """Give the policy a new value head, with weights named by `seed`, in place of one that it may have."""
        raise NotImplementedError(f"{self.name} has no value head")

    def value(self, batch: Batch) -> Tensor:
        """Values of the observations, float32 [N], differentiable, for policies to which a head can be added."""
        raise NotImplementedError(f"{self.name} has no value head")

    def outputs(self, batch: Batch) -> Outputs:
        """All that the policy says about `batch`; policies where parts of it share a forward pass make only one."""
        return Outputs(self, batch)

    @classmethod
    def fresh(
        cls, sentences: Sequence[str], actions: np.ndarray, states: np.ndarray, seed: int, width: float = 1.0
    ) -> Self:
        """A small new policy with random weights, for pretraining from scratch.

        Args:
            sentences: all that it must be able to read.
            actions: float32 [L, D], from which action statistics are taken.
            states: float32 [L, S], from which proprioception statistics are taken.
            seed: names the random weights.
            width: of the layers, as a multiple of the default; one of 1/2.
        """
        raise NotImplementedError(f"{cls.name} starts from a published checkpoint")

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Self:
        """Load a base checkpoint.

        Args:
            folder: of the checkpoint.
            dtype: of the weights; None takes what the checkpoint asks for, else float32.
            device: where the weights go.

        Raises:
            PerennialError: the folder is missing, truncated or does not fit this policy.
        """

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a base checkpoint: config.json, model.safetensors and what the processor needs.

        Args:
            folder: created where needed.
            dtype: of the stored weights; None keeps theirs.
        """

    def acting_weights(self) -> dict[str, Tensor]:
        """Detached copies of the weights to act with, by base parameter name, adapter merged in.

        The learner's own weights are not touched, so merging never drifts.
        """
        from perennial.policies.lora import merged_weights

        return merged_weights(self.model)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name, in a fixed order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @classmethod
    def anatomy(cls, folder: Path | None, instruction: str) -> Anatomy:
        """Sizes of the network, from which `perennial plan` counts memory and time; no weight is loaded.

        Args:
            folder: of a base checkpoint, of which the weights need not be there; None is the published model.
            instruction: what the policy is told.
        """
        raise NotImplementedError(f"{cls.name} does not describe its network")

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of `model` that gradient checkpointing may run twice: they do nothing but compute."""
        raise NotImplementedError(f"{self.name} has no blocks to recompute")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device
