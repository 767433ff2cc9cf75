"""Counter-based random streams.

Every draw in Perennial comes from a stream that is named by what it is for, for example
`stream(seed, "act", task, iteration, episode)`. Streams with different names are independent, and a stream never
depends on what was drawn before, on wall clock or on arrival order, so an interrupted run continues bit for bit.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

Key = tuple[str | int, ...]


def stream(seed: int, *key: str | int) -> np.random.Generator:
    """The Philox generator named by `seed` and `key`."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def integer_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed named by `seed` and `key`, for libraries that take only an integer."""
    return int(stream(seed, *key).integers(2**63 - 1))
