"""Scripted experts for ManiSkill's cubes, with privileged access to the simulation.

They have no memory: what to do follows from where hand and cubes are, so they recover from disturbances and serve many
environments in turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perennial.suites.base import Expert

_GAIN = 20.0
"""Commands per metre of distance; 1 asks for 10 cm, of which the arm makes less than half in a step."""
_TURN = 20.0
"""Commands per radian; 1 asks for 0.1."""
_DOWN = Rotation.from_rotvec([np.pi, 0, 0])
_OPEN, _CLOSED = 1.0, -1.0
_NEAR = 0.01
_FLAT = 0.1
"""Radians by which fingers may be askew when they close."""
_FUNNEL = 3.0
"""Metres of height kept for each metre that is missing sideways."""
_CRUISE = 0.1
_BESIDE = 0.045
"""Metres from the middle of a cube to the hand that is about to push it."""


def place(pose: Any) -> np.ndarray:
    """Position, float64 [3]."""
    return np.asarray(pose.p[0].numpy(), dtype=np.float64)


def spin(pose: Any) -> Rotation:
    """Orientation."""
    return Rotation.from_quat(np.roll(pose.q[0].numpy().astype(np.float64), -1))


def _command(hand: Any, move: np.ndarray, yaw: float, grip: float) -> np.ndarray:
    """The action that moves the hand by `move` metres and turns it downwards, its fingers at `yaw` radians."""
    wanted = Rotation.from_rotvec([0, 0, yaw]) * _DOWN
    turn = (wanted * spin(hand).inv()).as_rotvec()
    action = np.concatenate((_GAIN * move, -_TURN * turn, [grip]))
    clipped: np.ndarray = np.clip(action, -1, 1).astype(np.float32)
    return clipped


def towards(hand: np.ndarray, goal: np.ndarray, askew: float = 0.0) -> np.ndarray:
    """The way to `goal` in metres: through a funnel above it, and sideways only where the funnel is high enough.

    A hand that still has to turn by `askew` radians stays as high as one that is a tenth as many metres away.
    """
    aside = goal[:2] - hand[:2]
    missing = max(0.0, float(np.linalg.norm(aside)) - _NEAR / 2) + askew / 10
    height = goal[2] + min(_CRUISE, _FUNNEL * missing)
    return np.append(aside if hand[2] > height - 2 * _NEAR else np.zeros(2), height - hand[2])


def _askew(cube: Any, hand: Any) -> tuple[float, float]:
    """The yaw of the hand in radians, and by how much it must turn for its fingers to lie flat on the cube."""
    side, now = (float(rotation.as_euler("zyx")[0]) for rotation in (spin(cube), spin(hand) * _DOWN.inv()))
    return now, (side - now + np.pi / 4) % (np.pi / 2) - np.pi / 4


def _pick(env: Any, cube: Any, goal: np.ndarray, *, leave: bool) -> np.ndarray:
    """Bring a cube to `goal`, and leave it there or hold it."""
    pose = env.agent.tcp_pose
    hand, there = place(pose), place(cube.pose)
    yaw, turn = _askew(cube.pose, pose)
    held = bool(env.agent.is_grasping(cube).item())
    arrived = np.linalg.norm((there - goal)[:2]) < _NEAR / 2 and abs(there[2] - goal[2]) < _NEAR / 2
    if leave and arrived:
        return _command(pose, np.array([0, 0, 0 if held else _CRUISE]), yaw, _OPEN)
    if held:
        return _command(pose, towards(there, goal) if leave else goal - there, yaw, _CLOSED)
    askew = max(0.0, abs(turn) - _FLAT)
    near = np.linalg.norm(hand - there) < _NEAR and not askew
    return _command(pose, towards(hand, there, askew), yaw + turn, _CLOSED if near else _OPEN)


def _shove(env: Any, direction: float) -> np.ndarray:
    """Push the cube along the x axis towards its target, with closed fingers."""
    pose, there = env.agent.tcp_pose, place(env.obj.pose)
    hand = place(pose)
    start = there - np.array([direction * _BESIDE, 0, 0])
    behind = direction * (there[0] - hand[0]) > _BESIDE / 2 and hand[2] < there[2] + _NEAR
    if behind and abs(hand[1] - there[1]) < 2 * _NEAR:
        move = np.array([direction * _CRUISE, start[1] - hand[1], start[2] - hand[2]])
    else:
        move = towards(hand, start)
    return _command(pose, move, 0.0, _CLOSED)


def _pick_cube(environment: Any) -> np.ndarray:
    env = environment.simulation.env
    return _pick(env, env.cube, place(env.goal_site.pose), leave=False)


def _stack_cube(environment: Any) -> np.ndarray:
    env = environment.simulation.env
    on_top = place(env.cubeB.pose) + np.array([0, 0, 2 * float(env.cube_half_size[2])])
    return _pick(env, env.cubeA, on_top, leave=True)


def _push_cube(environment: Any) -> np.ndarray:
    return _shove(environment.simulation.env, 1.0)


def _pull_cube(environment: Any) -> np.ndarray:
    return _shove(environment.simulation.env, -1.0)


EXPERTS: dict[str, Expert] = {
    "PickCube": _pick_cube,
    "PushCube": _push_cube,
    "PullCube": _pull_cube,
    "StackCube": _stack_cube,
}
"""By task; each gives an action float32 [7]."""
