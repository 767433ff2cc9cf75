"""What fast rendering changes in the pictures: writes drawings to docs and prints the differences as Markdown.

Each row: as MuJoCo draws by default, the same in fast mode, as policies see it, and how much of 255 the last differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np

from perennial.suites._mujoco import HIDDEN_GROUP, choose_gl
from perennial.suites.kitchen import Kitchen
from perennial.suites.metaworld import MetaWorld

SIZE = 224
DOCS = Path(__file__).parent.parent / "docs"
Picture = np.ndarray
"""uint8 [SIZE, SIZE, 3]."""


def main() -> None:
    """Draw, compare, write."""
    choose_gl()
    print("| task | | mean | largest | pixels that differ by more than 8 |\n|---|---|---|---|---|")
    meta_world = [_meta_world(task) for task in ("button-press-topdown-v3", "drawer-open-v3", "hammer-v3")]
    imageio.v3.imwrite(DOCS / "fast-rendering.png", np.concatenate(meta_world))
    kitchen = [_kitchen(task) for task in ("kettle", "slide-cabinet-red")]
    imageio.v3.imwrite(DOCS / "kitchen-fast-rendering.png", np.concatenate(kitchen))


def _meta_world(task: str) -> np.ndarray:
    environment = MetaWorld().make(task, image_size=SIZE)
    environment.reset(options={"split": "evaluation", "index": 0})
    seen = environment.render()[0]
    simulation: Any = environment._simulation
    # Policies see what is filmed upright; the camera of Meta-World hangs upside down.
    default, plain = (
        _drawn(simulation.model, simulation.data, "corner2", fast=fast)[::-1, ::-1] for fast in (False, True)
    )
    environment.close()
    return _row(task, default, plain, seen)


def _kitchen(task: str) -> np.ndarray:
    environment = Kitchen().make(task, image_size=SIZE)
    environment.reset(options={"split": "evaluation", "index": 0})
    seen = environment.render()[0]
    simulation = environment.simulation
    model = simulation.film_model()
    default, plain = (_drawn(model, simulation.data, environment._camera, fast=fast) for fast in (False, True))
    environment.close()
    return _row(task, default, plain, seen)


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
