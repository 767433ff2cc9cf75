"""LIBERO as in the study of the simple recipe: 512 steps for all, training states shared with evaluation, one sentence.

arXiv 2603.11653 and its released code. Numbers from here are comparable with published ones, but were measured where
the policy was trained; use `libero` for numbers of your own. In the variant "cam2" of the tasks of spatial the camera
is where that code puts it for evaluation.
"""

from __future__ import annotations

from typing import ClassVar

from perennial.suites._libero.tasks import HORIZONS, tasks
from perennial.suites._libero.variants import PERTURBED
from perennial.suites.libero import Libero, Protocol

HORIZON = 512


class LiberoStudy(Libero):
    """LIBERO with the shared states and the horizon of the study; training hears the sentence of evaluation."""

    name: ClassVar[str] = "libero_study"
    shares = frozenset({"states", "sentences"})
    protocol: ClassVar[Protocol] = Protocol(
        stored={"training": range(50), "evaluation": range(50)},
        tasks=tasks(dict.fromkeys(HORIZONS, HORIZON), published=True),
        variants=(*PERTURBED, "cam2"),
    )
