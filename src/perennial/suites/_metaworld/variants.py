"""How the variants of the Meta-World tasks differ."""

from __future__ import annotations

from dataclasses import dataclass

CAMERA = "corner2"


@dataclass(frozen=True)
class Shift:
    """What a variant does to every task.

    Attributes:
        shell: smallest and largest distance of initial states from the centre of the task's reset space, in the
            maximum norm of the space scaled to [-1, 1].
        camera: position in metres.
        light: factor on the brightness of all lights.
        colours: factors on red, green and blue of all surfaces.
    """

    shell: tuple[float, float]
    camera: tuple[float, float, float] = (0.75, 0.075, 0.7)
    light: float = 1.0
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)


VARIANTS = {
    "id": Shift((0.0, 0.8)),
    "narrow": Shift((0.0, 0.3)),
    "ood_val": Shift((0.8, 0.9), camera=(0.75, 0.035, 0.73), light=0.8, colours=(1.0, 0.9, 0.8)),
    "ood_test": Shift((0.9, 1.0), camera=(0.72, 0.125, 0.68), light=1.25, colours=(0.8, 0.9, 1.0)),
}
