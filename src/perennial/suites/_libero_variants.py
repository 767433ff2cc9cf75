"""How the variants of the LIBERO tasks differ: by what is seen, by where the robot stands, or by the problem file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Offset = tuple[float, float]
"""Metres along x and y."""


@dataclass(frozen=True)
class Shift:
    """What a variant does to a task.

    Attributes:
        camera: how far the third-person camera is moved, in metres.
        light: factor on the brightness of all lights.
        robot: how far the robot's base is moved, in metres.
        moved: how far the region is moved in which each of these objects starts.
        kitchen: the living room becomes a kitchen.
        distractors: objects that do not belong to the task.
    """

    camera: tuple[float, float, float] = (0.0, 0.0, 0.0)
    light: float = 1.0
    robot: tuple[float, float, float] = (0.0, 0.0, 0.0)
    moved: Mapping[str, Offset] = field(default_factory=dict)
    kitchen: bool = False
    distractors: int = 0

    @property
    def rewrites(self) -> bool:
        """Whether the problem file changes, so that stored initial states do not fit."""
        return bool(self.moved) or self.kitchen or self.distractors > 0


PERTURBED = {
    "id": Shift(),
    "camera": Shift(camera=(-0.04, 0.06, 0.05)),
    "light": Shift(light=0.6),
    "robot": Shift(robot=(-0.02, 0.03, 0.0)),
}
"""The three kinds of perturbation in arXiv 2603.11653; it does not publish the sizes, so these are Perennial's own."""

_MUGS = {"white_yellow_mug_1": (0.0, -0.07), "porcelain_mug_1": (-0.05, 0.0), "plate_1": (0.0, 0.09)}
_MUGS_MEDIUM = _MUGS | {"plate_2": (-0.12, 0.0)}
_STOVE = {"flat_stove_1": (0.07, 0.0)}
_BASKET_MEDIUM = {"cream_cheese_1": (-0.08, 0.0), "basket_1": (0.03, -0.06)}
_BASKET_HARD = {"alphabet_soup_1": (-0.07, 0.05), "cream_cheese_1": (0.04, -0.1), "basket_1": (0.0, -0.06)}

RETAIN = {
    "long-2": {
        "medium": Shift(moved=_STOVE),
        "hard-0": Shift(moved=_STOVE, distractors=2),
        "hard-1": Shift(moved=_STOVE | {"moka_pot_1": (0.0, -0.07)}, distractors=2),
    },
    "long-4": {
        "medium": Shift(moved=_MUGS_MEDIUM),
        "hard-0": Shift(moved=_MUGS_MEDIUM | {"white_yellow_mug_1": (0.05, -0.09)}, distractors=3),
        "hard-1": Shift(kitchen=True),
    },
    "long-7": {
        "medium": Shift(moved=_BASKET_MEDIUM),
        "hard-0": Shift(moved=_BASKET_HARD, distractors=3),
        "hard-1": Shift(kitchen=True, distractors=3),
    },
}
"""The shifted settings of RETAIN (arXiv 2512.08333; offsets as in their released code), by task and variant.

"medium" is the one on which they choose coefficients, the other two are their tests.
"""


def shift(task: str, variant: str) -> Shift:
    """What `variant` does to `task`.

    Raises:
        KeyError: the variant is not defined for the task.
    """
    return PERTURBED[variant] if variant in PERTURBED else RETAIN[task][variant]


LAYOUTS, EPISODES_PER_LAYOUT = 5, 10
"""RETAIN draws distractors five times, and plays ten episodes with each."""

_DISTRACTORS = (
    "alphabet_soup",
    "bbq_sauce",
    "butter",
    "chocolate_pudding",
    "cookies",
    "cream_cheese",
    "ketchup",
    "milk",
    "orange_juice",
    "salad_dressing",
    "tomato_sauce",
)
"""Small objects of LIBERO. RETAIN excludes 25 objects by name; which ones is not known here."""
_HALF_WIDTH, _HALF_DEPTH, _CLEARANCE = 0.3, 0.275, 0.15
_REACH = 0.001
"""Half the side of the square, in metres, that a distractor starts in; MuJoCo refuses a region without an area."""
_ATTEMPTS = 10_000

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_RANGES = rf"\(\s*:ranges\s*\(\s*\(\s*(?P<box>{_NUMBER}(?:\s+{_NUMBER}){{3}})\s*\)"
_REGION = re.compile(rf"\((?P<name>\w+)\s*\(\s*:target\s+(?P<target>\w+)\s*\)\s*{_RANGES}")


def rewritten(problem: str, shift: Shift, rng: np.random.Generator) -> str:
    """LIBERO's problem file with the changes of `shift`; `rng` draws the distractors and their places.

    Raises:
        ValueError: an object to be moved does not start in a region of its own.
    """
    for name, offset in shift.moved.items():
        problem = _move(problem, name, offset)
    if shift.kitchen:
        problem = problem.replace("living_room_table", "kitchen_table").replace("Living_Room", "Kitchen")
    if shift.distractors:
        problem = _distract(problem, shift.distractors, rng)
    return problem


def _boxes(problem: str) -> dict[str, re.Match[str]]:
    """The regions with a rectangle x0 y0 x1 y1 in metres, by full name."""
    return {f"{found['target']}_{found['name']}": found for found in _REGION.finditer(problem)}


def _starts(problem: str) -> dict[str, str]:
    """Object -> full name of the region that it starts in."""
    begin = problem[problem.index("(:init") :]
    return dict(re.findall(r"\(On (\w+) (\w+)\)", begin[: begin.index("(:goal")]))


def _move(problem: str, name: str, offset: Offset) -> str:
    region = _boxes(problem).get(_starts(problem).get(name, ""))
    if region is None:
        raise ValueError(f"{name} does not start in a region of its own")
    box = np.array(region["box"].split(), float) + np.tile(offset, 2)
    begin, end = region.span("box")
    return problem[:begin] + " ".join(f"{edge:.6f}" for edge in box) + problem[end:]


def _distract(problem: str, count: int, rng: np.random.Generator) -> str:
    boxes, starts = _boxes(problem), _starts(problem)
    taken = [np.array(boxes[region]["box"].split(), float) for region in starts.values() if region in boxes]
    target = next(boxes[region]["target"] for region in starts.values() if region in boxes)
    absent = [kind for kind in _DISTRACTORS if f"{kind}_1" not in problem]
    regions, objects, begin = "", "", ""
    for number, kind in enumerate(rng.choice(absent, count, replace=False)):
        x, y = _free_place(taken, rng)
        taken.append(np.array([x - _REACH, y - _REACH, x + _REACH, y + _REACH]))
        square = " ".join(f"{edge:.6f}" for edge in taken[-1])
        turn = "(:yaw_rotation ((0.0 0.0)))"
        regions += f"(distractor_{number} (:target {target}) (:ranges (({square}))) {turn})\n"
        objects += f"{kind}_1 - {kind}\n"
        begin += f"(On {kind}_1 {target}_distractor_{number})\n"
    for section, addition in (("(:regions", regions), ("(:objects", objects), ("(:init", begin)):
        problem = problem.replace(section, f"{section}\n{addition}", 1)
    return problem


def _free_place(taken: list[np.ndarray], rng: np.random.Generator) -> Offset:
    """The middle of a square on the table that keeps its distance from all rectangles in `taken`."""
    farthest = np.array([_HALF_WIDTH, _HALF_DEPTH]) - _REACH
    for _ in range(_ATTEMPTS):
        x, y = rng.uniform(-farthest, farthest)
        gaps = [(max(x0 - x, x - x1, 0.0), max(y0 - y, y - y1, 0.0)) for x0, y0, x1, y1 in taken]
        if all(np.hypot(*gap) >= _CLEARANCE + 2 * _REACH for gap in gaps):
            return float(x), float(y)
    raise ValueError("there is no room for another distractor")
