"""A causal pass through the network of OpenVLA, over a whole sequence or over what was added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

    from perennial.policies._openvla.model import OpenVLAOFTModel


def causal_states(
    model: OpenVLAOFTModel, added: Tensor, mask: Tensor, read: int, cache: DynamicCache | None = None
) -> Tensor:
    """Final hidden states of the last `read` positions, [N, read, width]; each position sees itself and what precedes.

    Args:
        model: the network.
        added: embeddings [N, A, width] of the last A positions of the sequence.
        mask: bool [N, L] of the whole sequence, False at padding; the first column is never padding.
        read: positions to return, at most A.
        cache: keys and values of the first L - A positions, to which those of `added` are appended; None where A = L.
    """
    llama = model.language_model.model
    new, length = added.shape[1], mask.shape[1]
    positions = (mask.cumsum(1) - 1)[:, -new:]
    cos_and_sin = llama.rotary_emb(added, position_ids=positions)
    earlier = torch.ones(new, length, dtype=torch.bool, device=mask.device).tril(length - new)
    seen = earlier & mask[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=added.dtype, device=added.device)
    bias = bias.masked_fill(~seen, torch.finfo(added.dtype).min)
    hidden = added
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=cos_and_sin, past_key_values=cache)
    states: Tensor = llama.norm(hidden[:, -read:])
    return states
