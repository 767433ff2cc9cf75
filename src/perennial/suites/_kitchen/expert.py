"""A scripted expert for Franka Kitchen that moves the hand by differential inverse kinematics.

It knows where the things are. It has no memory: what to do follows from where hand and handle are, so it recovers from
disturbances and serves many environments in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

_ARM, _FINGERS = slice(0, 7), slice(7, 9)
_POSTURE = np.array([0.15, -1.77, 1.84, -2.48, 0.26, 0.71, 1.6])
"""Angles in radians that the arm prefers where the hand leaves it a choice."""
_LEAN = 0.05
"""Part of the way to its posture that the arm takes in a control step."""
_FACING = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
"""The hand looks at the kitchen, with its fingers side by side."""
_TIP = 0.04
"""Metres from the hand's site to where the fingers touch."""
_STIFFNESS = np.array([870.0] * 4 + [120.0] * 3)
_RESPONSE = np.array([2.0] * 4 + [1.6] * 3)
"""Commanded change of a joint per change that a control step brings, from stiffness and damping of the actuators."""
_REACH = 0.16
"""Radians by which an action of 1 moves the angle that an actuator pulls its joint to."""
_STEP, _TURN = 0.075, 0.25
"""Longest way and turn of the hand in a control step, in metres and radians."""
_GAIN = 0.5
"""Part of the way to its place that the hand takes in a control step."""
_PUSH = 0.15
"""Metres behind the handle that the hand aims at when it pushes."""
_GAP = 0.065
"""Metres between the fingers below which they hold something."""
_NEAR = 0.015
"""Metres within which the hand is at its place."""
_FUNNEL, _BACK = 5.0, 0.2
"""Metres kept in front of a handle for each metre that is missing sideways, and the most of them."""
_MARGIN = 0.01
"""Radians that joints keep from their limits."""
_DAMPING = 0.04
"""Of the pseudo-inverse, against large steps near singular postures."""
_WEIGHTS = np.array([1, 1, 1, 0.3, 0.3, 0.3])
"""Of the hand's motion along and about x, y and z, where not all of it is possible."""
_OPEN, _CLOSED = 1.0, -1.0


@dataclass(frozen=True)
class Handle:
    """What the hand acts on, in the frame of the body that moves.

    Attributes:
        body: its name.
        touch: where, in metres.
        push: direction in which it is pushed; None where it is gripped.
        pull: radians by which the hand leads the door that it pulls.
        twist: radians by which the hand leads the knob that it turns.
        depth: metres by which the fingers reach behind `touch` to grip.
        pitch: degrees by which the hand looks down.
        wide: push with open fingers.
    """

    body: str
    touch: tuple[float, float, float]
    push: tuple[float, float, float] | None = None
    pull: float = 0.0
    twist: float = 0.0
    depth: float = 0.035
    pitch: float = 0.0
    wide: bool = False


_SLIDE = Handle("slidelink", (-0.183, -0.123, 0.0), push=(1.0, 0.0, 0.0))
HANDLES = {
    "microwave": Handle("microdoorroot", (0.475, -0.108, 0.0), pull=-0.3),
    "kettle": Handle("kettle", (0.0, -0.12, 0.09), push=(0.0, 1.0, 0.0), pitch=40, wide=True),
    "bottom-burner": Handle("knob 2", (0.0, 0.0, 0.03), twist=0.8, depth=0.0),
    "top-burner": Handle("knob 4", (0.0, 0.0, 0.03), twist=0.8, depth=0.0),
    "light-switch": Handle("lightswitchroot", (0.03, -0.075, 0.0), push=(-1.0, 0.0, 0.0)),
    "slide-cabinet": _SLIDE,
    "hinge-cabinet": Handle("hingerightdoor", (-0.302, -0.128, 0.0), pull=0.6),
    "slide-cabinet-red": _SLIDE,
    "slide-cabinet-yellow": _SLIDE,
}


class ScriptedExpert:
    """The expert of `task`."""

    def __init__(self, task: str) -> None:
        self._handle = HANDLES[task]

    def __call__(self, environment: Any) -> np.ndarray:
        """The action in the environment's present state, float32 [9] in [-1, 1]."""
        model, data = environment.simulation.model, environment.simulation.data
        tip, turned = _hand(data)
        place, facing, grip = self._aim(model, data, tip)
        return _towards(model, data, _GAIN * (place - tip), _GAIN * _rotation(facing @ turned.T), grip)

    def _aim(self, model: Any, data: Any, tip: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Where the fingers should go next, the hand's rotation matrix there, and what the fingers do."""
        handle = self._handle
        body = data.body(handle.body)
        frame = body.xmat.reshape(3, 3)
        touch = body.xpos + frame @ handle.touch
        facing = _about(0, -math.radians(handle.pitch)) @ _FACING
        ahead = facing[:, 2]
        if handle.push:
            return _pushed(tip, touch, frame @ handle.push, ahead), facing, _OPEN if handle.wide else _CLOSED
        place = touch + handle.depth * ahead
        holds = data.qpos[_FINGERS].sum() < _GAP
        far = np.linalg.norm(tip - place) > (4 if holds else 2) * _NEAR
        if handle.twist:
            lead = 0.0 if far or not holds else handle.twist
            facing = _about(1, math.atan2(frame[0, 1], frame[2, 1]) + lead) @ facing
        if far:
            return _funnel(tip, place, ahead), facing, _OPEN
        if holds and handle.pull:
            hinge = data.xanchor[model.body_jntadr[body.id]]
            place = hinge + _about(2, handle.pull) @ (place - hinge)
        return place, facing, _CLOSED


def _hand(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the fingers touch, in metres, and the hand's rotation matrix."""
    site = data.site("end_effector")
    turned = site.xmat.reshape(3, 3)
    return site.xpos + _TIP * turned[:, 2], turned


def _about(axis: int, angle: float) -> np.ndarray:
    """The matrix of a rotation by `angle` in radians about x, y or z."""
    quaternion, matrix = np.zeros(4), np.empty(9)
    quaternion[[0, axis + 1]] = math.cos(angle / 2), math.sin(angle / 2)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def _pushed(tip: np.ndarray, touch: np.ndarray, push: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Where the fingers go to push: beside the handle first, then through it."""
    away = tip - touch
    along = away @ push
    aside = np.linalg.norm(away - along * push)
    if -0.1 < along < 0.03 and aside < 2 * _NEAR:
        return touch + _PUSH * push
    return _funnel(tip, touch - 0.06 * push, ahead)


def _funnel(tip: np.ndarray, place: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """The next place on the way to `place` that comes at it from the front."""
    way = place - tip
    aside = float(np.linalg.norm(way - (way @ ahead) * ahead))
    return place - min(_BACK, _FUNNEL * max(0.0, aside - _NEAR / 2)) * ahead


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """Axis times angle in radians, float [3], of a rotation matrix."""
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(matrix).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def _towards(model: Any, data: Any, way: np.ndarray, turn: np.ndarray, grip: float) -> np.ndarray:
    """The action that moves and turns the hand, which also carries the weight of the arm."""
    site = model.site("end_effector").id
    jacobian = np.empty((2, 3, model.nv))
    mujoco.mj_jacSite(model, data, jacobian[0], jacobian[1], site)
    jacobian[0] += np.cross(jacobian[1].T, _TIP * data.site_xmat[site].reshape(3, 3)[:, 2]).T
    motion = jacobian[:, :, _ARM].reshape(6, 7) * _WEIGHTS[:, None]
    wanted = np.concatenate((_shortened(way, _STEP), _shortened(turn, _TURN))) * _WEIGHTS
    change = _joints(motion, wanted, data.qpos[_ARM], model.jnt_range[_ARM])
    action = np.full(9, grip)
    command = _RESPONSE * change / _REACH
    command /= max(1.0, np.abs(command).max())
    action[_ARM] = command + data.qfrc_bias[_ARM] / _STIFFNESS / _REACH
    clipped: np.ndarray = np.clip(action, -1, 1).astype(np.float32)
    return clipped


def _joints(motion: np.ndarray, wanted: np.ndarray, angles: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Changes of the arm's joints, float [7], for a motion of the hand; joints stop at their limits."""
    lean = _LEAN * (_POSTURE - angles)
    free = np.ones(7)
    for _ in range(3):
        reach = motion * free
        inverse = reach.T @ np.linalg.inv(reach @ reach.T + _DAMPING**2 * np.eye(6))
        change = inverse @ wanted + free * (lean - inverse @ (reach @ lean))
        after = angles + change
        below = (after < limits[:, 0] + _MARGIN) & (change < 0)
        above = (after > limits[:, 1] - _MARGIN) & (change > 0)
        if not ((below | above) * free).any():
            break
        free[below | above] = 0
    result: np.ndarray = change * free
    return result


def _shortened(vector: np.ndarray, longest: float) -> np.ndarray:
    """The vector, or one in its direction that is `longest` long if that is shorter."""
    length = np.linalg.norm(vector)
    return vector * min(1.0, longest / length) if length else vector
