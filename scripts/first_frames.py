r"""Draws first evaluation frames of tasks side by side, one camera below the other, as policies see them.

    python scripts/first_frames.py libero_wrist docs/libero.png spatial-0 object-0 goal-0 long-4 90-75
    python scripts/first_frames.py libero_study docs/libero-shifted.png spatial-0 spatial-0:camera spatial-0:cam2 \
        spatial-0:light spatial-0:robot
    python scripts/first_frames.py libero_retain docs/libero-retain.png long-4 long-4:medium long-4:hard-0 long-4:hard-1

A task may be followed by a colon and a variant.
"""

import sys
from pathlib import Path

import imageio.v3
import numpy as np

from perennial import discovery
from perennial.suites.base import Suite

SIZE = 128


def main(name: str, target: str, *tasks: str) -> None:
    """Draw, write."""
    suite, columns = discovery.find("suites", name, Suite)(), []
    for task in tasks:
        named, _, variant = task.partition(":")
        environment = suite.make(named, variant or suite.variants[0], image_size=SIZE)
        environment.reset(options={"split": "evaluation", "index": 0})
        columns.append(np.concatenate(np.asarray(environment.render())))
        environment.close()
    imageio.v3.imwrite(Path(target), np.concatenate(columns, axis=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
