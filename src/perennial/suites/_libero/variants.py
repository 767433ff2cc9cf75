"""How the variants of the LIBERO tasks differ: by what is seen, by where the robot stands, or by the problem file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from perennial.errors import PerennialError

Offset = tuple[float, float]
"""Metres along x and y."""
Pose = tuple[tuple[float, float, float], tuple[float, float, float, float]]
"""Place in metres and quaternion, w first."""


@dataclass(frozen=True)
class Shift:
    """What a variant does to a task.

    Attributes:
        camera: how far the third-person camera is moved, in metres.
        view: where the third-person camera is instead, before it is moved.
        light: factor on the brightness of all lights.
        robot: how far the robot's base is moved, in metres.
        moved: how far the region is moved in which each of these objects starts.
        kitchen: the living room becomes a kitchen.
        distractors: objects that do not belong to the task.
    """

    camera: tuple[float, float, float] = (0.0, 0.0, 0.0)
    view: Pose | None = None
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
"""The three kinds of perturbation in arXiv 2603.11653. Its code has poses of the camera, see `cam2`, but no sizes for
light and robot, so these are Perennial's own."""

_SEEN_FROM: tuple[Pose, ...] = (
    ((0.63861317, 0.0, 1.61035002), (0.63801772, 0.30484972, 0.30484984, 0.63801772)),
    ((0.6586, 0.05, 1.6104), (0.638, 0.305, 0.304, 0.638)),
    ((0.6586, -0.05, 1.6104), (0.638, 0.304, 0.305, 0.638)),
    ((0.6786, 0.0, 1.6304), (0.637, 0.305, 0.305, 0.637)),
    ((0.659, 0.01, 1.611), (0.638, 0.305, 0.304, 0.638)),
    ((0.6786, -0.06, 1.6304), (0.637, 0.304, 0.306, 0.637)),
    ((0.6986, 0.0, 1.5904), (0.639, 0.304, 0.304, 0.639)),
    ((0.659, 0.0, 1.611), (0.638, 0.304, 0.305, 0.638)),
    ((0.658, 0.0, 1.61), (0.638, 0.305, 0.304, 0.638)),
    ((0.6786, 0.0, 1.6104), (0.639, 0.305, 0.305, 0.639)),
)
CAM2 = {f"spatial-{place}": {"cam2": Shift(view=pose)} for place, pose in enumerate(_SEEN_FROM)}
"""Where the released code of arXiv 2603.11653 puts the camera for evaluation in `libero_spatial_cam2`, by task."""

_MUGS = {"white_yellow_mug_1": (0.0, -0.07), "porcelain_mug_1": (-0.05, 0.0)}
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
        "medium": Shift(moved=_MUGS),
        "hard-0": Shift(moved=_MUGS | {"white_yellow_mug_1": (0.05, -0.09)}, distractors=3),
        "hard-1": Shift(kitchen=True),
    },
    "long-7": {
        "medium": Shift(moved=_BASKET_MEDIUM),
        "hard-0": Shift(moved=_BASKET_HARD, distractors=3),
        "hard-1": Shift(kitchen=True, distractors=3),
    },
}
"""The shifted settings of RETAIN (arXiv 2512.08333) as its released code runs them, by task and variant.

"medium" is the one on which they choose coefficients, the other two are their tests. Their offsets for the plates of
long-4 are not here, since they have no effect there: only what starts in a region called `..._init_region` moves.
"""


def shift(task: str, variant: str) -> Shift:
    """What `variant` does to `task`.

    Raises:
        PerennialError: the variant is not defined for the task.
    """
    special = CAM2 | RETAIN
    changes = PERTURBED | special.get(task, {})
    if variant not in changes:
        others = ", ".join(name for name, variants in special.items() if variant in variants)
        raise PerennialError(f"The variant {variant!r} is defined for {others}, not for {task!r}; choose another task.")
    return changes[variant]


LAYOUTS, EPISODES_PER_LAYOUT = 5, 10
"""RETAIN draws distractors five times, and plays ten episodes with each."""

_DISTRACTORS = (
    "akita_black_bowl",
    "alphabet_soup",
    "bbq_sauce",
    "black_book",
    "bowl_drainer",
    "butter",
    "chocolate_pudding",
    "cookies",
    "cream_cheese",
    "glazed_rim_porcelain_ramekin",
    "ketchup",
    "macaroni_and_cheese",
    "milk",
    "moka_pot",
    "new_salad_dressing",
    "orange_juice",
    "plate",
    "popcorn",
    "porcelain_mug",
    "red_coffee_mug",
    "tomato_sauce",
    "white_bowl",
    "white_yellow_mug",
    "wine_bottle",
    "yellow_book",
)
"""LIBERO's kinds of things without the twenty large ones and five others that RETAIN's code excludes."""
_HALF_WIDTH, _HALF_DEPTH = 0.3, 0.275
_CLEARANCE, _CLEARANCE_OF_LARGE = 0.15, 0.25
_LARGE = ("basket", "flat_stove")
"""Those of RETAIN's large things whose regions its three tasks have."""
_REACH = 0.00001
"""Half the side of the square, in metres, that a distractor starts in."""
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
    taken = [_surroundings(boxes[region]) for region in starts.values() if region in boxes]
    target = next(boxes[region]["target"] for region in starts.values() if region in boxes)
    absent = [kind for kind in _DISTRACTORS if not re.search(rf"- {kind}\b", problem)]
    regions, objects, begin = "", "", ""
    for number, kind in enumerate(rng.choice(absent, count, replace=False)):
        x, y = _free_place(taken, rng)
        square = np.array([x - _REACH, y - _REACH, x + _REACH, y + _REACH])
        taken.append(_grown(square, _CLEARANCE))
        box, turn = " ".join(f"{edge:.6f}" for edge in square), "(:yaw_rotation ((0.0 0.0)))"
        regions += f"(distractor_{number} (:target {target}) (:ranges (({box}))) {turn})\n"
        objects += f"{kind}_1 - {kind}\n"
        begin += f"(On {kind}_1 {target}_distractor_{number})\n"
    for section, addition in (("(:regions", regions), ("(:objects", objects), ("(:init", begin)):
        problem = problem.replace(section, f"{section}\n{addition}", 1)
    return problem


def _surroundings(region: re.Match[str]) -> np.ndarray:
    """The rectangle in which no distractor stands because something else starts in `region`."""
    large = region["name"].startswith(_LARGE)
    return _grown(np.array(region["box"].split(), float), _CLEARANCE_OF_LARGE if large else _CLEARANCE)


def _grown(box: np.ndarray, margin: float) -> np.ndarray:
    return box + margin * np.array([-1, -1, 1, 1])


def _free_place(taken: list[np.ndarray], rng: np.random.Generator) -> Offset:
    """A place on the table outside all rectangles in `taken`."""
    for _ in range(_ATTEMPTS):
        x, y = rng.uniform(-_HALF_WIDTH, _HALF_WIDTH), rng.uniform(-_HALF_DEPTH, _HALF_DEPTH)
        if not any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in taken):
            return float(x), float(y)
    raise ValueError("there is no room for another distractor")
