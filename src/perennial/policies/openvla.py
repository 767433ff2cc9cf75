"""OpenVLA: the discrete tokens of an action one after another (Kim et al., arXiv 2406.09246).

The network is that of OpenVLA-OFT, with causal attention and without action slots: each token is read from the
position before it and then becomes an input. Acting keeps keys and values of earlier positions; learning sees all
tokens at once (teacher forcing), which gives the same log-probabilities in one forward pass. Unlike the published
code, which decodes by the whole vocabulary, only action tokens are ever chosen, as in RLinf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from perennial.policies._openvla.decoding import causal_states
from perennial.policies.base import ActionChunk, Batch, Observation
from perennial.policies.lora import unwrap
from perennial.policies.openvla_oft import OpenVLAOFT, choose


class OpenVLA(OpenVLAOFT):
    """A fused-vision Llama that decides token by token; see `OpenVLAOFT` for actions, tokens and checkpoints."""

    name: ClassVar[str] = "openvla"
    published_chunk: ClassVar[int] = 1
    one_by_one: ClassVar[bool] = True

    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """Decide each token by the inverse of its cumulative distribution at the next of K uniform numbers per row."""
        from transformers import DynamicCache

        network, tokens, cache = unwrap(self.model), self.config.tokens, DynamicCache()
        uniform = None if temperature == 0 else np.stack([generator.random(tokens) for generator in rng])
        decided: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            added, mask = network.prefix(*self._inputs(observation))  # type: ignore[operator]
            while len(decided) < tokens:
                if decided:
                    added = self._embed(decided[-1][0])
                    mask = functional.pad(mask, (0, 1), value=True)
                logits = self.classify(causal_states(network, added, mask, 1, cache))  # type: ignore[arg-type]
                number = len(decided)
                decided.append(
                    choose(logits, temperature, None if uniform is None else uniform[:, number : number + 1])
                )
        choice, log_prob = (torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*decided, strict=True))
        return ActionChunk(self.decode(choice), choice, log_prob)

    def features(self, batch: Batch) -> Tensor:
        """Hidden states that the action tokens are read from, each given the tokens of `batch.sample` before it."""
        network = unwrap(self.model)
        prefix, mask = network.prefix(*self._inputs(batch.observation))  # type: ignore[operator]
        forced = self._embed(torch.from_numpy(batch.sample[:, :-1]).to(prefix.device))
        mask = functional.pad(mask, (0, forced.shape[1]), value=True)
        sequence = torch.cat([prefix, forced], dim=1)
        return causal_states(network, sequence, mask, self.config.tokens)  # type: ignore[arg-type]

    def _embed(self, sample: Tensor) -> Tensor:
        """Input embeddings of action tokens, [N, tokens, width]."""
        first = self.config.vocab_size - self.config.action_bins
        embedded: Tensor = unwrap(self.model).language_model.model.embed_tokens(first + sample)  # type: ignore[operator,union-attr]
        return embedded
