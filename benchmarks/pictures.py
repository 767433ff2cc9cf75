"""What fast rendering changes in the pictures: writes drawings to docs and prints the differences as Markdown.

Each row: as MuJoCo draws by default, the same in fast mode, as policies see it, and how much of 255 the last differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np

from perennial.suites._mujoco import HIDDEN_GROUP, choose_gl
from perennial.suites.base import Suite
from perennial.suites.kitchen import Kitchen
from perennial.suites.metaworld import MetaWorld

SIZE = 224
DOCS = Path(__file__).parent.parent / "docs"
Picture = np.ndarray
"""uint8 [SIZE, SIZE, 3]."""
Scene = Callable[[Any], tuple[Any, Any, str]]
"""From an environment to a model, its state and a camera."""


def main() -> None:
    """Draw, compare, write."""
    choose_gl()
    print("| task | | mean | largest | pixels that differ by more than 8 |\n|---|---|---|---|---|")
    meta_world = ("button-press-topdown-v3", "drawer-open-v3", "hammer-v3")
    # The camera of Meta-World hangs upside down, and policies see its pictures upright.
    _draw("fast-rendering", MetaWorld(), meta_world, _meta_world, slice(None, None, -1))
    _draw("kitchen-fast-rendering", Kitchen(), ("kettle", "slide-cabinet-red"), _kitchen, slice(None))


def _meta_world(environment: Any) -> tuple[Any, Any, str]:
    """The model with everything in it, its present state and the camera that policies look through."""
    return environment._simulation.model, environment._simulation.data, "corner2"


def _kitchen(environment: Any) -> tuple[Any, Any, str]:
    """The same of Franka Kitchen, with the arm's true surfaces."""
    return environment.simulation.film_model(), environment.simulation.data, environment._camera


def _draw(name: str, suite: Suite, tasks: Sequence[str], scene: Scene, upright: slice) -> None:
    """Write the drawing `name` with one row for each task; `upright` is how to go along both axes of a picture."""
    rows = []
    for task in tasks:
        environment = suite.make(task, image_size=SIZE)
        environment.reset(options={"split": "evaluation", "index": 0})
        seen = environment.render()[0]
        default, plain = (_drawn(*scene(environment), fast=fast)[upright, upright] for fast in (False, True))
        environment.close()
        rows.append(_row(task, default, plain, seen))
    imageio.v3.imwrite(DOCS / f"{name}.png", np.concatenate(rows))


def _row(task: str, default: Picture, plain: Picture, seen: Picture) -> np.ndarray:
    """The pictures side by side with how `seen` differs, uint8 [SIZE, 4 SIZE, 3]; prints how both differ."""
    differences = {"drawn fast": _difference(plain, default), "as policies see it": _difference(seen, default)}
    for name, found in differences.items():
        share = (found.max(-1) > 8).mean()
        print(f"| `{task}` | {name} | {found.mean():.1f} | {found.max()} | {share:.0%} |")
    return np.concatenate((default, plain, seen, differences["as policies see it"]), axis=1)


def _drawn(model: Any, data: Any, camera: str, *, fast: bool) -> Picture:
    """The whole scene with MuJoCo's default settings, or without samples, shadows, reflections and sky."""
    import mujoco

    model.vis.quality.offsamples, model.vis.quality.shadowsize = (0 if fast else 4), 4096
    model.vis.global_.offwidth = model.vis.global_.offheight = SIZE
    option = mujoco.MjvOption()
    option.geomgroup[HIDDEN_GROUP] = 1
    with mujoco.Renderer(model, SIZE, SIZE) as renderer:
        renderer.update_scene(data, camera, option)
        if fast:
            flag = mujoco.mjtRndFlag
            for off in (flag.mjRND_SHADOW, flag.mjRND_REFLECTION, flag.mjRND_SKYBOX):
                renderer.scene.flags[off] = False
        picture: Picture = renderer.render()
    return picture


def _difference(one: Picture, other: Picture) -> Picture:
    """Absolute, uint8."""
    return np.abs(one.astype(int) - other).astype(np.uint8)


if __name__ == "__main__":
    main()
