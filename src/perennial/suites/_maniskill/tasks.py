"""The table-top tasks of ManiSkill and the words for them."""

from __future__ import annotations

from perennial.suites.base import Sequence, Task

_TABLE_TOP: dict[str, tuple[int, str, tuple[str, str]]] = {
    "PushCube": (
        50,
        "push the cube onto the round target",
        ("push the blue cube forward to the red and white target", "slide the cube away from you onto the circle"),
    ),
    "PullCube": (
        50,
        "pull the cube onto the round target",
        ("pull the blue cube back to the red and white target", "drag the cube towards you onto the circle"),
    ),
    "PickCube": (
        50,
        "pick up the red cube and hold it at the green ball",
        ("grasp the red cube and bring it to the green ball", "lift the cube to where the green ball is"),
    ),
    "StackCube": (
        50,
        "put the red cube on top of the green cube",
        ("stack the red cube on the green one", "pick up the red cube and set it down on the green cube"),
    ),
    "LiftPegUpright": (
        50,
        "stand the peg upright on the table",
        ("raise the peg until it stands on its end", "set the lying peg up on one end"),
    ),
    "PegInsertionSide": (
        100,
        "insert the orange end of the peg into the hole of the box",
        ("pick up the peg and push its orange end into the box", "put the peg into the hole in the side of the box"),
    ),
}
"""By ManiSkill's name without its version: horizon, sentence of evaluation, sentences of training."""

TASKS = {name: Task(name, taught, told, horizon) for name, (horizon, told, taught) in _TABLE_TOP.items()}

SEQUENCES = {
    "cubes": Sequence(("PushCube", "PullCube", "PickCube"), ("StackCube",)),
    "table_top": Sequence(tuple(_TABLE_TOP), ()),
}
