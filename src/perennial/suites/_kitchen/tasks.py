"""The tasks of Franka Kitchen in words, what solves them, and how their variants differ."""

from __future__ import annotations

from dataclasses import dataclass

from perennial.suites.base import Sequence, Task

_HORIZON = 96
"""Control steps, 7.7 s; the scripted expert needs at most 70."""

# name: (first training paraphrase, second training paraphrase, evaluation paraphrase)
_SENTENCES = {
    "microwave": ("open the microwave", "pull the microwave door open", "open the door of the microwave"),
    "kettle": (
        "move the kettle to the back burner",
        "push the kettle back to the top burner",
        "push the kettle to the back burner",
    ),
    "bottom-burner": (
        "turn on the bottom burner",
        "turn the knob of the bottom burner",
        "turn the bottom burner on",
    ),
    "top-burner": ("turn on the top burner", "turn the knob of the top burner", "turn the top burner on"),
    "light-switch": ("turn on the light", "switch the light on", "switch on the light"),
    "slide-cabinet": (
        "slide the cabinet door open",
        "open the sliding cabinet",
        "slide open the door of the sliding cabinet",
    ),
    "hinge-cabinet": (
        "open the hinge cabinet",
        "pull the door of the hinge cabinet open",
        "open the door of the hinge cabinet",
    ),
    "slide-cabinet-red": (
        "slide the red cabinet door open",
        "open the red sliding cabinet",
        "slide open the red door of the sliding cabinet",
    ),
    "slide-cabinet-yellow": (
        "slide the yellow cabinet door open",
        "open the yellow sliding cabinet",
        "slide open the yellow door of the sliding cabinet",
    ),
}

TASKS = {
    name: Task(name, (first, second), evaluation, _HORIZON) for name, (first, second, evaluation) in _SENTENCES.items()
}

DOORS = {"slide-cabinet-red": (0.8, 0.1, 0.1), "slide-cabinet-yellow": (0.9, 0.8, 0.1)}
"""Red, green and blue of the sliding door in the tasks that repaint it."""


@dataclass(frozen=True)
class Shift:
    """What a variant does to every task.

    Attributes:
        shell: smallest and largest distance of initial states from the centre of their range, in the maximum norm of
            the range scaled to [-1, 1].
        camera: azimuth and elevation in degrees.
        light: factor on the brightness of all lights.
    """

    shell: tuple[float, float]
    camera: tuple[float, float] = (70.0, -35.0)
    light: float = 1.0


VARIANTS = {
    "id": Shift((0.0, 0.8)),
    "ood_val": Shift((0.8, 0.9), camera=(74.0, -33.0), light=0.8),
    "ood_test": Shift((0.9, 1.0), camera=(66.0, -38.0), light=1.25),
}

SEQUENCES = {
    "sub_tasks": Sequence(trained=tuple(name for name in TASKS if name not in DOORS), held_out=tuple(DOORS)),
    "ire_vla": Sequence(
        trained=("slide-cabinet-red", "hinge-cabinet"),
        held_out=("bottom-burner", "light-switch", "microwave", "slide-cabinet", "slide-cabinet-yellow"),
    ),
}
