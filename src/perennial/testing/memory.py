"""Measures memory on the CPU: what autograd keeps, and the most that torch's allocator held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Storages that autograd still keeps at the end of what is computed inside: address -> bytes, weights included.

    The dictionary is filled when the block ends.
    """
    sizes: dict[int, int] = {}
    alive: WeakSet[_Kept] = WeakSet()

    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        yield sizes
    storages = [kept.tensor.untyped_storage() for kept in alive]
    sizes |= {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Kept:
    """A tensor for as long as autograd keeps it; detached, as it would else keep the node that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` held of torch's CPU memory at once, beyond what was there before it.

    Every allocation and release is recorded by torch's profiler, so this counts tensors and no library's own memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
