"""OpenVLA-OFT with the regression head of the official checkpoints, for evaluation and imitation.

The head says one action and no distribution, so there is no log-probability: reinforcement learning is refused before a
run starts. A sample is the K = chunk x D normalised numbers that the head gave, float32 [N, K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies.base import ActionChunk, Batch, Observation, Outputs
from perennial.policies.lora import unwrap
from perennial.policies.openvla_oft import OpenVLAOFT

REASON = "its regression head says one action and no probabilities"


class OpenVLAOFTL1(OpenVLAOFT):
    """A fused-vision Llama whose regression head says the numbers of a chunk at once; see `OpenVLAOFT` for the rest."""

    name: ClassVar[str] = "openvla_oft_l1"
    regression: ClassVar[bool] = True
    missing: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("log_prob", "logits", "features", "classify", "value"), REASON
    )

    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """The head's action, at any temperature; nothing is drawn."""
        with torch.inference_mode():
            sample = self._said(observation).flatten(1).cpu().numpy()
        return ActionChunk(self.decode(sample), sample, np.zeros(sample.shape, np.float32))

    def log_prob(self, batch: Batch) -> Tensor:
        """None.

        Raises:
            PerennialError: always.
        """
        raise PerennialError(f"{self.name} has no log-probability, as {REASON}; imitate, or choose another policy.")

    def logits(self, batch: Batch) -> Tensor:
        """None.

        Raises:
            PerennialError: always.
        """
        raise PerennialError(f"{self.name} has no logits, as {REASON}; imitate, or choose another policy.")

    def imitation_loss(self, batch: Batch) -> Tensor:
        """Absolute error of the normalised numbers, float32 [N], the mean over each row's unmasked numbers."""
        target = torch.from_numpy(batch.sample).to(self.device)
        error = (self._said(batch.observation).flatten(1) - target).abs()
        mask = torch.from_numpy(batch.mask).to(error.device)
        return (error * mask).sum(1) / mask.sum(1).clamp(min=1)

    def outputs(self, batch: Batch) -> Outputs:
        """The imitation loss."""
        return Outputs(self, batch)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised mean action of each held window of `actions` [N, C, D]; float32 [N, K]."""
        return self._unit(actions).reshape(len(actions), -1).astype(np.float32)

    def decode(self, sample: np.ndarray) -> np.ndarray:
        """Actions float32 [N, C, D] that the numbers `sample` [N, K] stand for; they may leave the data's range."""
        return self._actions(sample)

    def _said(self, observation: Observation) -> Tensor:
        """Normalised actions, float32 [N, chunk, D]."""
        network = unwrap(self.model)
        said: Tensor = network.action_head(network(*self._inputs(observation)))  # type: ignore[operator]
        return said.float()
