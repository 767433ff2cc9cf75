"""Batches that are kept: put together, drawn from, and written as flat tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from perennial.policies.base import Batch, Observation, Policy, concatenate


def draw(memories: Sequence[Batch], rng: np.random.Generator, size: int) -> Batch:
    """`size` rows of all `memories`, each row equally likely, without repetition unless there are too few."""
    total = sum(len(memory) for memory in memories)
    rows = np.sort(rng.choice(total, size, replace=size > total))
    parts, first = [], 0
    for memory in memories:
        parts.append(memory.take(rows[(rows >= first) & (rows < first + len(memory))] - first))
        first += len(memory)
    return concatenate(parts)


def row_bytes(policy: Policy, bins: int) -> int:
    """Bytes of a kept decision at least: the picture of one camera; each token, its mask and its logits of `bins`."""
    return 3 * policy.image_size**2 + len(policy.token_steps) * (8 + 1 + 4 * bins)


def to_tensors(batch: Batch) -> dict[str, Tensor]:
    """Flat tensors; the instructions become the bytes of a JSON list."""
    arrays = {
        "images": batch.observation.images,
        "states": batch.observation.states,
        "instructions": np.frombuffer(json.dumps(batch.observation.instructions).encode(), np.uint8),
        "sample": batch.sample,
        "mask": batch.mask,
    }
    if batch.logits is not None:
        arrays["logits"] = batch.logits
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> Batch:
    """The inverse of `to_tensors`."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    instructions = tuple(json.loads(arrays["instructions"].tobytes()))
    observation = Observation(arrays["images"], instructions, arrays["states"])
    return Batch(observation, arrays["sample"], arrays["mask"], logits=arrays.get("logits"))
