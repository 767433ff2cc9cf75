"""What this machine gives a process: cores, memory, and what only some systems can do with other processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import resource

PR_SET_PDEATHSIG = 1
"""Of Linux' <linux/prctl.h>: the signal that a process gets when its parent is gone."""
LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None) if LINUX else None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(core_numbers())


def core_numbers() -> list[int]:
    """The numbers of these cores, ascending; all of the machine's where the system cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes that are started meanwhile stay on `core`, where the system can do that; elsewhere on any."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    former = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, former)


def end_with_parent() -> None:
    """Called in a new process: let it be killed when its parent ends, where the system can do that."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The largest resident set of a process that has ended."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, within the limits of the container or batch job, if any.

    Limits are those of cgroups v1 and v2, of the process's group and all above it; file cache that can be dropped
    counts as free.

    Args:
        system: where the system's own files lie.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(system)]))


def _left_in_groups(system: Path) -> Iterator[int]:
    """What each limited group of this process has left."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no groups on this system
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = Path(group.lstrip("/"))
        for place in (system / top / each for each in (own, *own.parents)):
            try:
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                left = int((place / limit).read_text()) - int((place / used).read_text()) + int(stat[cache])
            except (OSError, ValueError, KeyError):  # no such group from in here, or its limit is the word "max"
                continue
            yield left
