"""Named points at which a test kills the process, as a power cut would.

`PERENNIAL_KILL_AT=update:3` ends the process by SIGKILL when it passes the point `update` for the third time.
"""

from __future__ import annotations

import collections
import os
import signal

_passed: collections.Counter[str] = collections.Counter()


def point(name: str) -> None:
    """Pass the point `name`."""
    wanted = os.environ.get("PERENNIAL_KILL_AT")
    if wanted is None:
        return
    _passed[name] += 1
    where, _, count = wanted.partition(":")
    if where == name and _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
