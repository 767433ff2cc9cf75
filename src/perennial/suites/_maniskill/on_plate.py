"""The files and initial states of the tasks "put ... on plate", without a simulator.

Task, models and photographs are those of RL4VLA (arXiv 2505.19789; in github.com/gen-robot/RL4VLA
`put_on_in_scene_multi.py`, PutOnPlateInScene25Main-v3), on which the simple recipe (arXiv 2603.11653) builds.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.errors import PerennialError
from perennial.randomness import stream

ASSETS = "PERENNIAL_PLATE_ASSETS"
"""Environment variable that names RL4VLA's folder `ManiSkill/mani_skill/assets/carrot`."""

PLATE = "001_plate_simpler"
TABLES = {"id": range(1), "tables": range(1, 16)}
"""Photographs by variant: RL4VLA's first table, and the other fifteen that it trains on."""
TABLE_TOP = 0.8695
"""Height of the table in metres, on which an earlier scene of theirs puts the same plate."""

LOW = np.array([-0.05, -0.05, -0.05, -0.25, -0.25, -0.25, 0.0], np.float32)
HIGH = np.array([0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0], np.float32)
"""Of actions, in metres, radians, and closed to open; from the 1st to the 99th percentile BridgeData lies inside."""

_TURNS = 4
_CENTRE = np.array([-0.16, 0.0])
_GRID = np.linspace(-0.075, 0.075, 6)
_APART = 0.07
"""Metres that thing and plate are apart at least."""
_MARGIN_ASIDE, _MARGIN_ABOVE, _FORCE = 0.01, 0.05, 0.03
"""Metres, metres and newtons of what counts as lying on the plate."""


@dataclass(frozen=True)
class Layout:
    """One initial state.

    Attributes:
        table: index of the photograph.
        thing, plate: x and y in metres.
        yaw: of the thing, in radians; a multiple of 45 degrees.
    """

    table: int
    thing: tuple[float, float]
    plate: tuple[float, float]
    yaw: float


@functools.cache
def _pairs() -> tuple[tuple[tuple[float, float], tuple[float, float]], ...]:
    """Where thing and plate may lie: two points of a grid of 6 x 6 that are far enough apart."""
    points = [(float(x), float(y)) for x, y in itertools.product(_CENTRE[0] + _GRID, _CENTRE[1] + _GRID)]
    return tuple((a, b) for a, b in itertools.permutations(points, 2) if np.hypot(a[0] - b[0], a[1] - b[1]) > _APART)


@functools.cache
def _order(variant: str) -> np.ndarray:
    """All states in an order without a pattern, the last few left out so that three splits are of one size."""
    every = stream(0, "things and plates", variant).permutation(len(TABLES[variant]) * len(_pairs()) * _TURNS)
    return every[: len(every) // 3 * 3]


def states(variant: str) -> int:
    """Initial states of each split."""
    return len(_order(variant)) // 3


def layout(variant: str, number: int) -> Layout:
    """The initial state with this number, modulo three times `states(variant)`; see `suites.base.state_number`."""
    order = _order(variant)
    rest, turn = divmod(int(order[number % len(order)]), _TURNS)
    table, pair = divmod(rest, len(_pairs()))
    thing, plate = _pairs()[pair]
    return Layout(TABLES[variant][table], thing, plate, turn * np.pi / _TURNS)


def lies(offset: np.ndarray, thing: np.ndarray, plate: np.ndarray, force: float) -> bool:
    """Whether the thing lies on the plate: above it, near enough, low enough, and touching it.

    Args:
        offset: from the plate to the thing in metres, [3].
        thing: half of its size along the axes of the world in metres, [3].
        plate: the same of the plate.
        force: between the two, in newtons.
    """
    above = 0 < offset[2] <= thing[2] + plate[2] + _MARGIN_ABOVE
    near = np.linalg.norm(offset[:2]) <= plate.max() + _MARGIN_ASIDE
    return bool(above and near and force > _FORCE)


@dataclass(frozen=True)
class Model:
    """One of RL4VLA's models.

    Attributes:
        folder: with its meshes.
        extent: of its bounding box, in metres, float64 [3].
        centre: of its bounding box, in metres, float64 [3].
        density: in kilograms per cubic metre.
    """

    folder: Path
    extent: np.ndarray
    centre: np.ndarray
    density: float

    @property
    def collision(self) -> Path:
        """Its convex parts."""
        return self.folder / "collision.obj"

    @property
    def visual(self) -> Path:
        """What is seen of it."""
        kinds = [self.folder / f"textured.{kind}" for kind in ("obj", "dae", "glb")]
        return next((file for file in kinds if file.is_file()), kinds[-1])


def thing(name: str) -> Model:
    """The model of the thing called `name`, as in "ketchup bottle".

    Raises:
        PerennialError: it is missing.
    """
    known = _read("more_carrot")
    found = [key for key, entry in known.items() if entry["name"] == name]
    if not found:
        raise _incomplete(f"model_db.json knows no {name!r}")
    return _model("more_carrot", found[0], known)


def plate() -> Model:
    """The plate.

    Raises:
        PerennialError: it is missing.
    """
    return _model("more_plate", PLATE, _read("more_plate"))


def tables() -> list[Path]:
    """The photographs that hide the simulated table, by `Layout.table`.

    Raises:
        PerennialError: one is missing.
    """
    files = [_folder() / "more_table" / "imgs" / name for name in list(_read("more_table"))[: TABLES["tables"].stop]]
    return [_present(file) for file in files]


def require(name: str) -> None:
    """See that all files for the task with the thing `name` are here, the robot's among them.

    Raises:
        PerennialError: one is missing.
    """
    thing(name), plate(), tables()
    root = Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")).expanduser()
    robot = root / "data" / "robots" / "widowx" / "wx250s.urdf"
    if not robot.is_file():
        raise PerennialError(
            f"The robot of these tasks is not in {robot.parent}: run `python -m mani_skill.utils.download_asset "
            "widowx250s`."
        )


def _folder() -> Path:
    named = os.environ.get(ASSETS)
    if not named:
        raise PerennialError(
            "The tasks on a plate need RL4VLA's models and photographs: run `git clone "
            f"https://github.com/gen-robot/RL4VLA` and set {ASSETS} to its folder ManiSkill/mani_skill/assets/carrot."
        )
    return Path(named).expanduser().absolute()


def _read(kind: str) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(_present(_folder() / kind / "model_db.json").read_text())
    return entries


def _model(kind: str, key: str, known: dict[str, Any]) -> Model:
    entry = known[key]
    low, high = (np.array(entry["bbox"][end]) for end in ("min", "max"))
    model = Model(_folder() / kind / key, high - low, (low + high) / 2, float(entry["density"]))
    _present(model.collision), _present(model.visual)
    return model


def _present(file: Path) -> Path:
    if not file.is_file():
        raise _incomplete(f"no file {file}")
    return file


def _incomplete(reason: str) -> PerennialError:
    return PerennialError(
        f"{ASSETS}={os.environ.get(ASSETS)} is not RL4VLA's folder of models ({reason}): set it to the folder "
        "ManiSkill/mani_skill/assets/carrot of a complete clone of github.com/gen-robot/RL4VLA."
    )
