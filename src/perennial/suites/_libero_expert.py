"""A scripted pick-and-place expert for LIBERO's tasks of one object, with privileged access to the simulation.

It has no memory: what to do follows from where hand and things are, so it recovers from disturbances and serves many
environments in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

SUITES = ("spatial", "object")
_OPEN, _CLOSED = -1.0, 1.0
_DOWN = Rotation.from_rotvec([np.pi, 0, 0])
_GAIN = 25.0
"""Commands per metre of distance; 1 asks for 5 cm."""
_STEP = 0.05
_TURN = 0.5
_NEAR = 0.012
_FUNNEL = 4.0
"""Metres of height kept for each metre that is missing sideways."""
_SHUT, _WIDE = 0.004, 0.072
"""Metres between the fingers: less holds nothing, more is open."""
_STILL = 0.02
_ABOVE = 0.12
_CLEAR = 0.04
_WALL = 0.046
"""Metres from the middle of LIBERO's bowl to its wall, which is what the fingers take."""
_HAND = np.array([0.035, 0.11, 0.0])
"""Half the breadth of the hand above its fingers, in metres."""
_BOX = 6


@dataclass(frozen=True)
class Thing:
    """A body with the axis-aligned bounds of what can be touched of it, in metres."""

    name: str
    place: np.ndarray
    low: np.ndarray
    high: np.ndarray


def act(environment: Any) -> np.ndarray:
    """The expert's action in the environment's present state, float32 [7]."""
    scene = environment.simulation.present()
    env, data = scene.env, scene.sim.data._data
    _, name, target = env.parsed_problem["goal_state"][0]
    things = {thing: _measure(scene, thing) for thing in env.objects_dict}
    item = things[name]
    goal = next(things[thing] for thing in things if target.startswith(thing) and thing != name)
    hand = data.site_xpos[scene.robot.eef_site_id].copy()
    there = _grasp(item, [thing for thing in things.values() if thing is not item])
    gap = np.abs(data.qpos[scene.robot._ref_gripper_joint_pos_indexes]).sum()
    speed = np.abs(data.qvel[scene.robot._ref_gripper_joint_vel_indexes]).max()
    between = bool(_SHUT < gap < _WIDE and np.linalg.norm(hand - there) < 3 * _NEAR)
    arrived = np.linalg.norm(item.place[:2] - goal.place[:2]) < _NEAR
    cruise = item.high[2] + _ABOVE
    if arrived:
        place, grip = _let_go(item, goal, hand, between)
    elif between and speed < _STILL:
        place, grip = _carry(item, goal, hand), _CLOSED
        cruise = hand[2] - item.low[2] + _CLEAR + _barrier(scene, item, goal)
    else:
        place, grip = there, _CLOSED if np.linalg.norm(hand - there) < _NEAR else _OPEN
    return _approach(hand, place, cruise, _tilt(data, scene), grip)


def _barrier(scene: Any, item: Thing, goal: Thing) -> float:
    """Height of what the item must be lifted over: its goal, and the furniture that it is still on or in."""
    heights = [goal.high[2]]
    for name, fixture in scene.env.fixtures_dict.items():
        if hasattr(fixture, "root_body"):
            body = _measure(scene, name)
            inside = (item.place[:2] > body.low[:2] - _STEP) & (item.place[:2] < body.high[:2] + _STEP)
            if inside.all():
                heights.append(body.high[2])
    return float(max(heights))


def _grasp(item: Thing, others: list[Thing]) -> np.ndarray:
    """Where the hand takes the item, near its middle or a bowl by its wall, so that it bumps into others least."""
    middle = (item.low + item.high) / 2
    middle[2] = max(item.low[2] + _NEAR, item.high[2] - 0.03)
    if item.high[1] - item.low[1] < 2 * _WALL:
        aside = max(0.0, min(_STEP / 2, (item.high[0] - item.low[0]) / 2 - _NEAR))
        places = [middle + np.array([x, 0, 0]) for x in (0, -aside, aside)]
    else:
        places = [middle + np.array([0, y, 0]) for y in (-_WALL, _WALL)]
    bumps = [sum(_bump(place, other) for other in others) for place in places]
    best: np.ndarray = places[int(np.argmin(bumps))]
    return best


def _bump(hand: np.ndarray, other: Thing) -> float:
    """How far, in metres, a thing that is as high as the hand's broad part reaches into the room below that part."""
    if other.high[2] < hand[2] + _STEP / 2:
        return 0.0
    overlap = np.minimum(other.high, hand + _HAND)[:2] - np.maximum(other.low, hand - _HAND)[:2]
    return float(max(0.0, overlap.min()))


def _carry(item: Thing, goal: Thing, hand: np.ndarray) -> np.ndarray:
    """Where the hand must be for the item to be over the goal, deep enough to be let go."""
    return np.append(goal.place[:2] + (hand - item.place)[:2], hand[2] + _height(item, goal, hand))


def _height(item: Thing, goal: Thing, hand: np.ndarray) -> float:
    """How far the hand still has to rise: a thing ends on a plate, or a hand just inside a basket."""
    if goal.high[2] - goal.low[2] > 0.1:
        return float(goal.high[2] - 0.02 - hand[2])
    return float(goal.high[2] - item.low[2])


def _let_go(item: Thing, goal: Thing, hand: np.ndarray, between: bool) -> tuple[np.ndarray, float]:
    """Lower the item onto its goal, open, and rise."""
    rise = _height(item, goal, hand)
    if between and rise < -_NEAR:
        return hand + np.array([0, 0, rise]), _CLOSED
    return hand + np.array([0, 0, 0 if between else _STEP]), _OPEN


def _approach(hand: np.ndarray, place: np.ndarray, cruise: float, tilt: np.ndarray, grip: float) -> np.ndarray:
    """One step towards `place`: through a funnel above it, and sideways only where the funnel is high enough."""
    aside = place[:2] - hand[:2]
    height = min(max(cruise, place[2]), place[2] + _FUNNEL * max(0.0, float(np.linalg.norm(aside)) - _NEAR / 2))
    if hand[2] < height - 2 * _NEAR:
        aside = np.zeros(2)
    move = _GAIN * np.append(aside, height - hand[2])
    action = np.concatenate((move, tilt / _TURN, [grip]))
    clipped: np.ndarray = np.clip(action, -1, 1).astype(np.float32)
    return clipped


def _tilt(data: Any, scene: Any) -> np.ndarray:
    """The rotation in radians that makes the hand point down, with its fingers side by side along y."""
    quaternion = np.roll(data.body(scene.robot.robot_model.eef_name).xquat, -1)
    turn: np.ndarray = (_DOWN * Rotation.from_quat(quaternion).inv()).as_rotvec()
    return turn


def _measure(scene: Any, name: str) -> Thing:
    model, data = scene.model, scene.sim.data._data
    body = scene.env.obj_body_id[name]
    solid = np.flatnonzero((model.body_rootid[model.geom_bodyid] == body) & (model.geom_contype > 0))
    axes = np.abs(data.geom_xmat[solid].reshape(-1, 3, 3))
    sizes = np.where((model.geom_type[solid] == _BOX)[:, None], model.geom_size[solid], model.geom_rbound[solid, None])
    reach = (axes @ sizes[:, :, None])[..., 0]
    centres = data.geom_xpos[solid]
    return Thing(name, data.xpos[body].copy(), (centres - reach).min(0), (centres + reach).max(0))
