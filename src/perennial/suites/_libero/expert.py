"""A scripted pick-and-place expert for LIBERO's tasks of one object, with privileged access to the simulation.

It reaches, closes, carries and opens, and begins again where the object was lost. What it remembers of an episode is
where it is in that order; everything else follows from where hand and things are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from scipy.spatial.transform import Rotation

TASKS = frozenset(f"{suite}-{place}" for suite in ("spatial", "object") for place in range(10))

_OPEN, _CLOSED = -1.0, 1.0
_DOWN = Rotation.from_rotvec([np.pi, 0, 0])
_GAIN = 40.0
"""Commands per metre of distance; 1 asks for 5 cm."""
_TURN = 0.5
_NEAR, _REACHED, _LOST = 0.012, 0.02, 0.05
_STILL = 0.0005
"""Metres in a step below which a hand is taken to be held up."""
_FUNNEL = 4.0
"""Metres of height kept for each metre that is missing sideways."""
_ABOVE, _CLEAR, _ASIDE = 0.12, 0.04, 0.025
_GRIPPING = 8
"""Steps that the fingers take to close or open."""
_RELEASING = 2 * _GRIPPING
_WALL = 0.046
"""Metres from the middle of LIBERO's bowl to its wall, which is what the fingers take."""
_HAND = np.array([0.035, 0.11, 0.0])
"""Half the breadth of the hand above its fingers, in metres."""
_BOX = 6


@dataclass(frozen=True)
class Thing:
    """A body with the axis-aligned bounds of what can be touched of it, in metres.

    Its own x axis, which in a cabinet runs along the fronts of the drawers, is at `yaw` radians from the world's.
    """

    place: np.ndarray
    low: np.ndarray
    high: np.ndarray
    yaw: float = 0.0


@dataclass
class Progress:
    """Where an episode is.

    Attributes:
        phase: "reach", "close", "carry" or "open", and `steps` since it began.
        place: where the phase begins; `offset`, from the item to the hand when it was taken.
        before: where the hand was a step ago.
        barrier: height in metres of what the item is lifted over, when it was taken: what sticks to it rises with it.
        turn: radians about the vertical by which the hand is turned, see `_grasp`; kept from reaching to letting go.
    """

    phase: str = "reach"
    steps: int = 0
    place: np.ndarray = field(default_factory=lambda: np.zeros(3))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    before: np.ndarray = field(default_factory=lambda: np.zeros(3))
    barrier: float = 0.0
    turn: float = 0.0

    def enter(self, phase: str, place: np.ndarray) -> None:
        """Begin a phase."""
        self.phase, self.steps, self.place = phase, 0, place


class PickAndPlace:
    """The expert; it can play several environments in turn."""

    def __init__(self) -> None:
        self._progress: WeakKeyDictionary[Any, Progress] = WeakKeyDictionary()

    def __call__(self, environment: Any) -> np.ndarray:
        """The action in the environment's present state, float32 [7]."""
        if environment.steps == 0:
            self._progress[environment] = Progress()
        progress = self._progress.setdefault(environment, Progress())
        scene = environment.simulation.present()
        data = scene.sim.data._data
        _, name, target = scene.env.parsed_problem["goal_state"][0]
        things = {thing: _measure(scene, thing) for thing in scene.env.objects_dict}
        item = things.pop(name)
        goal = next(thing for other, thing in things.items() if target.startswith(other))
        hand = data.site_xpos[scene.robot.eef_site_id].copy()
        move, grip = _decide(progress, hand, item, goal, [*things.values(), *_furniture(scene)])
        action = np.concatenate((_GAIN * move, _tilt(data, scene, progress.turn) / _TURN, [grip]))
        clipped: np.ndarray = np.clip(action, -1, 1).astype(np.float32)
        return clipped


def _decide(
    progress: Progress, hand: np.ndarray, item: Thing, goal: Thing, obstacles: list[Thing]
) -> tuple[np.ndarray, float]:
    """Where to move the hand, in metres, and what to do with the fingers; `obstacles` include the goal."""
    there, turn = _grasp(item, obstacles)
    if progress.phase == "reach":
        progress.turn = turn
    _advance(progress, hand, item, goal, obstacles, there)
    progress.steps, progress.before = progress.steps + 1, hand
    if progress.phase == "reach":
        return _towards(hand, there, item.high[2] + _ABOVE, hand), _OPEN
    if progress.phase == "carry":
        cruise = progress.offset[2] + item.place[2] - item.low[2] + progress.barrier + _CLEAR
        return _towards(hand, _carried(hand, item, goal), cruise, progress.place), _CLOSED
    if progress.phase == "close":
        return progress.place - hand, _CLOSED
    rise = _CLEAR if progress.steps > _GRIPPING else 0
    return progress.place + np.array([0, 0, rise]) - hand, _OPEN


def _advance(
    progress: Progress, hand: np.ndarray, item: Thing, goal: Thing, obstacles: list[Thing], there: np.ndarray
) -> None:
    """Begin the next phase if this one has done its work."""
    if progress.phase == "reach" and np.linalg.norm(hand - there) < _REACHED:
        progress.enter("close", there)
    elif progress.phase == "close" and progress.steps >= _GRIPPING:
        progress.enter("carry", hand)
        progress.offset, progress.barrier = hand - item.place, _barrier(obstacles, item, goal)
    elif progress.phase == "carry":
        missing = np.linalg.norm(hand - _carried(hand, item, goal))
        resting = progress.steps > _GRIPPING and np.linalg.norm(hand - progress.before) < _STILL
        if np.linalg.norm(hand - item.place - progress.offset) > _LOST:
            progress.enter("reach", hand)
        elif missing < _NEAR or (missing < _LOST and resting):
            progress.enter("open", hand)
    elif progress.phase == "open" and progress.steps >= _RELEASING:
        progress.enter("reach", hand)


def _carried(hand: np.ndarray, item: Thing, goal: Thing) -> np.ndarray:
    """Where the hand lets go: with the item's underside on a plate, or just inside a basket."""
    basket = goal.high[2] - goal.low[2] > 2 * _LOST
    height = goal.high[2] - _REACHED if basket else hand[2] + goal.high[2] - item.low[2]
    return np.append(goal.place[:2] + hand[:2] - item.place[:2], height)


def _furniture(scene: Any) -> list[Thing]:
    """What stands on the table and cannot be moved."""
    fixtures = scene.env.fixtures_dict.items()
    return [_measure(scene, name) for name, fixture in fixtures if hasattr(fixture, "root_body")]


def _barrier(obstacles: list[Thing], item: Thing, goal: Thing) -> float:
    """Height of what the item must be lifted over: its goal, and what it is on, in or near."""
    heights = [goal.high[2]]
    for body in obstacles:
        inside = (item.place[:2] > body.low[:2] - _LOST) & (item.place[:2] < body.high[:2] + _LOST)
        if inside.all():
            heights.append(body.high[2])
    return float(max(heights))


def _grasp(item: Thing, others: list[Thing]) -> tuple[np.ndarray, float]:
    """Where the hand takes the item, and by how much it is turned for that from fingers side by side along y.

    It takes a bowl by its wall and other things near their middle, so that it bumps into others least. In a drawer the
    open fingers have room side by side along its front only, and the more the nearer they are to its middle. Half a
    turn makes no difference to the fingers; of the two turns one keeps the wrist's last joint away from its limits.
    """
    middle = (item.low + item.high) / 2
    middle[2] = max(item.low[2] + _NEAR, item.high[2] - 0.03)
    if item.high[1] - item.low[1] < 2 * _WALL:
        aside = max(0.0, min(_ASIDE, (item.high[0] - item.low[0]) / 2 - _NEAR))
        places = [middle + np.array([x, 0, 0]) for x in (0, -aside, aside)]
    elif (drawer := _drawer(item, others)) is not None:
        wall = _WALL * np.array([np.cos(drawer.yaw), np.sin(drawer.yaw), 0])
        inmost = min((middle - wall, middle + wall), key=lambda place: np.linalg.norm((place - drawer.place)[:2]))
        return inmost, (drawer.yaw - np.pi / 4) % np.pi - np.pi / 4
    else:
        places = [middle + np.array([0, y, 0]) for y in (-_WALL, _WALL)]
    bumps = [sum(_bump(place, other) for other in others) for place in places]
    return places[int(np.argmin(bumps))], 0.0


def _drawer(item: Thing, others: list[Thing]) -> Thing | None:
    """What the item is in, if that reaches about as high as the item's rim."""
    middle, enough = (item.low + item.high) / 2, item.high[2] - _NEAR
    around = [other for other in others if (other.low < middle).all() and (middle < other.high)[:2].all()]
    return next((other for other in around if other.high[2] > enough), None)


def _bump(hand: np.ndarray, other: Thing) -> float:
    """How much of the room under the hand's broad part, in square metres, is taken by a thing as high as that part."""
    if other.high[2] < hand[2] + _ASIDE:
        return 0.0
    overlap = np.minimum(other.high, hand + _HAND)[:2] - np.maximum(other.low, hand - _HAND)[:2]
    return float(overlap.clip(0).prod())


def _towards(hand: np.ndarray, place: np.ndarray, cruise: float, start: np.ndarray) -> np.ndarray:
    """The way to go: through a funnel above `place`; straight up over `start` until the funnel is reached."""
    aside = place[:2] - hand[:2]
    missing = max(0.0, float(np.linalg.norm(aside)) - _NEAR / 2)
    height = min(max(cruise, place[2]), place[2] + _FUNNEL * missing)
    if hand[2] < height - 2 * _NEAR:
        aside = start[:2] - hand[:2]
    return np.append(aside, height - hand[2])


def _tilt(data: Any, scene: Any, turn: float) -> np.ndarray:
    """The rotation in radians that makes the hand point down, turned by `turn` from fingers side by side along y."""
    quaternion = np.roll(data.body(scene.robot.robot_model.eef_name).xquat, -1)
    wanted = Rotation.from_rotvec([0, 0, turn]) * _DOWN
    missing: np.ndarray = (wanted * Rotation.from_quat(quaternion).inv()).as_rotvec()
    return missing


def _measure(scene: Any, name: str) -> Thing:
    model, data = scene.model, scene.sim.data._data
    body = scene.env.obj_body_id[name]
    solid = np.flatnonzero((model.body_rootid[model.geom_bodyid] == body) & (model.geom_contype > 0))
    axes = np.abs(data.geom_xmat[solid].reshape(-1, 3, 3))
    sizes = np.where((model.geom_type[solid] == _BOX)[:, None], model.geom_size[solid], model.geom_rbound[solid, None])
    reach = (axes @ sizes[:, :, None])[..., 0]
    centres = data.geom_xpos[solid]
    yaw = float(np.arctan2(data.xmat[body][3], data.xmat[body][0]))
    return Thing(data.xpos[body].copy(), (centres - reach).min(0), (centres + reach).max(0), yaw)
