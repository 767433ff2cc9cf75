"""What fast rendering changes in the pictures: writes docs/fast-rendering.png and prints the differences as Markdown.

Each row: as MuJoCo draws by default, the same in fast mode, as policies see it, and how much of 255 the last differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np

from perennial.suites._mujoco import HIDDEN_GROUP, choose_gl
from perennial.suites.metaworld import MetaWorld

SIZE = 224
TASKS = ("button-press-topdown-v3", "drawer-open-v3", "hammer-v3")
CAMERA = "corner2"


def main() -> None:
    """Draw, compare, write."""
    choose_gl()
    suite, rows = MetaWorld(), []
    print("| task | | mean | largest | pixels that differ by more than 8 |\n|---|---|---|---|---|")
    for task in TASKS:
        environment = suite.make(task, image_size=SIZE)
        environment.reset(options={"split": "evaluation", "index": 0})
        seen = environment.render()[0]
        simulation: Any = environment._simulation
        default, plain = (_drawn(simulation.model, simulation.data, fast=fast) for fast in (False, True))
        environment.close()
        differences = {
            "fast, nothing hidden": _difference(plain, default),
            "as policies see it": _difference(seen, default),
        }
        for name, found in differences.items():
            share = (found.max(-1) > 8).mean()
            print(f"| `{task}` | {name} | {found.mean():.1f} | {found.max()} | {share:.0%} |")
        rows.append(np.concatenate((default, plain, seen, differences["as policies see it"]), axis=1))
    target = Path(__file__).parent.parent / "docs" / "fast-rendering.png"
    imageio.v3.imwrite(target, np.concatenate(rows))


def _drawn(model: Any, data: Any, *, fast: bool) -> np.ndarray:
    """The whole scene with MuJoCo's default settings, or without samples, shadows, reflections and sky."""
    import mujoco

    model.vis.quality.offsamples, model.vis.quality.shadowsize = (0 if fast else 4), 4096
    option = mujoco.MjvOption()
    option.geomgroup[HIDDEN_GROUP] = 1
    with mujoco.Renderer(model, SIZE, SIZE) as renderer:
        renderer.update_scene(data, CAMERA, option)
        if fast:
            flag = mujoco.mjtRndFlag
            for off in (flag.mjRND_SHADOW, flag.mjRND_REFLECTION, flag.mjRND_SKYBOX):
                renderer.scene.flags[off] = False
        picture: np.ndarray = renderer.render()[::-1, ::-1]
    return picture


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Absolute, uint8."""
    return np.abs(one.astype(int) - other).astype(np.uint8)


if __name__ == "__main__":
    main()
