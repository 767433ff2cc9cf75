"""What the base of an adapter is recognised by, in memory as on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SCHEME = "sampled:"
PIECES, PIECE = 16, 2048
"""Of a larger matrix so many pieces are taken, of so many numbers each; a smaller one is taken whole."""


def spans(count: int) -> list[tuple[int, int]]:
    """Which elements [start, stop) of a flattened matrix of `count` numbers are sampled: evenly spread, both ends."""
    if count <= PIECES * PIECE:
        return [(0, count)]
    starts = [(count - PIECE) * piece // (PIECES - 1) for piece in range(PIECES)]
    return [(start, start + PIECE) for start in starts]


def sample(weights: Tensor) -> Tensor:
    """The sampled elements of a matrix in memory, 1-D."""
    flat = weights.detach().flatten()
    return torch.cat([flat[start:stop] for start, stop in spans(flat.numel())])


def identity(samples: Mapping[str, Tensor]) -> str:
    """A SHA-256 over samples of the weights that an adapter updates, each rounded to bfloat16.

    So it is the same in float32 and bfloat16, in every layout that `merging.places` knows and however a checkpoint is
    sharded; and it costs at most 128 kB of reading for each layer, where a hash of everything reads all 15 GB of a
    base of 7 billion parameters. Fine-tuning a layer changes numbers all over its matrix, which is seen. Not seen are
    changes of a few rows between the samples, changes too small for bfloat16, and weights that the adapter does not
    update: norms, biases, embeddings.

    Args:
        samples: name of the weight -> sampled elements, of any floating-point type.
    """
    digest = hashlib.sha256()
    for name, numbers in sorted(samples.items()):
        digest.update(f"{name} {len(numbers)} ".encode())
        digest.update(numbers.float().bfloat16().cpu().view(torch.uint8).numpy().data)
    return SCHEME + digest.hexdigest()
