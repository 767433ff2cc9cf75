"""Write into REPRODUCE.md what its runs cost, as `perennial plan` counts it, so that no figure is copied by hand.

A cost is hours of the model on the GPU that it names and core-hours of the simulator, as in `39.7 h H100 + 149 core-h`.
Words in its place are left alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

from perennial import cli

PAGE = Path(__file__).parents[1] / "REPRODUCE.md"
COST = re.compile(r"[\d.]+ h (?P<gpu>\w+) \+ [\d.]+ core-h(?= \| `perennial run (?P<words>[^`]+)` \|$)", re.MULTILINE)


def cost(gpu: str, words: str) -> str:
    """What `perennial plan` counts for `perennial run` with these words.

    Raises:
        ValueError: the run does not fit on the GPU as it is written.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["plan", *shlex.split(words), "--json"])
    plan = json.loads(printed.getvalue())
    (counted,) = [found for name, found in plan["gpus"].items() if name.startswith(f"{gpu} ")]
    if counted is None or counted["switches"]:
        raise ValueError(f"`perennial run {words}` does not fit on one {gpu}; see `perennial plan`.")
    model, simulator = counted["acting"] + counted["learning"], counted["simulating"] * plan["workers"]
    return f"{model / 3600:.3g} h {gpu} + {simulator / 3600:.3g} core-h"


def filled(text: str) -> str:
    """`text` with every cost counted anew."""
    return COST.sub(lambda row: cost(row["gpu"], row["words"]), text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
