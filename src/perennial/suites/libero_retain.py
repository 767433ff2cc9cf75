"""LIBERO as in RETAIN: three long tasks with moved objects, distractors and another room, two cameras.

arXiv 2512.08333 and its released code. Variant "medium" is for choosing coefficients, "hard-0" and "hard-1" are for
testing; each of these has five layouts of ten episodes. Held out are twenty tasks that the generalist knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from perennial.suites import base
from perennial.suites._libero.tasks import FILES, HORIZONS, tasks
from perennial.suites._libero.variants import RETAIN
from perennial.suites.libero import THIRD_PERSON, WRIST, Libero, Protocol

TARGETS = tuple(RETAIN)
GENERALIST = tuple(
    f"{suite}-{place}"
    for suite in ("spatial", "object", "goal", "90")
    for place in range(0, len(FILES[suite]), len(FILES[suite]) // 5)
)


class LiberoRetain(Libero):
    """The three target tasks of RETAIN with their shifted versions, and the twenty of the generalist."""

    name: ClassVar[str] = "libero_retain"
    shares = frozenset({"states", "sentences"})
    protocol: ClassVar[Protocol] = Protocol(
        cameras=(THIRD_PERSON, WRIST),
        stored={"training": range(50), "evaluation": range(50)},
        tasks={name: task for name, task in tasks(HORIZONS, published=True).items() if name in TARGETS + GENERALIST},
        variants=("id", "medium", "hard-0", "hard-1"),
    )
    sequences: Mapping[str, base.Sequence] = {"retain": base.Sequence(TARGETS, GENERALIST)}
