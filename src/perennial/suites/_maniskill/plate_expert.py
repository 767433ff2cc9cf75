"""A scripted expert for the tasks "put ... on plate", with privileged access to the simulation.

It has no memory: what to do follows from where the gripper, its target, thing and plate are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from perennial.suites._maniskill import on_plate
from perennial.suites._maniskill.experts import place, spin, towards

_STEP = 0.03
"""Metres of one action at most; BridgeData's are seldom longer."""
_TURN = 0.2
"""Radians of one action at most."""
_NEAR = 0.012
_FLAT = 0.1
"""Radians by which fingers may be askew when they close."""
_LOWEST = on_plate.TABLE_TOP + 0.017
"""Height of the gripper in metres at which its fingers nearly touch the table."""
_DOWN = Rotation.from_matrix(np.array([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]]))
"""The gripper points along its x axis and closes along its y axis."""
_PER_RADIAN = 0.004
"""Metres of width for which it is not worth turning the gripper by a radian."""


def put_on_plate(environment: Any) -> np.ndarray:
    """The action in the present state, float32 [7]."""
    simulation = environment.simulation
    env = simulation.env
    hand, there = place(simulation.hand), env.thing_centre()
    turn = spin(env.thing.pose)
    held = bool(env.agent.is_grasping(env.thing).item())
    yaw, askew = _grip(turn, env.thing_extent, _yaw(spin(simulation.hand)))
    if held:
        goal = place(env.plate.pose) + np.array([0, 0, np.abs(turn.as_matrix()[2]) @ env.thing_extent / 2])
        arrived = np.linalg.norm((there - goal)[:2]) < _NEAR and there[2] < goal[2] + _NEAR
        return _command(simulation, towards(there, goal), yaw - askew, opened=bool(arrived))
    goal = np.append(there[:2], max(there[2], _LOWEST))
    near = np.linalg.norm(hand - goal) < _NEAR and abs(askew) < _FLAT
    return _command(simulation, towards(hand, goal, max(0.0, abs(askew) - _FLAT)), yaw, opened=not near)


def _yaw(hand: Rotation) -> float:
    return float((hand * _DOWN.inv()).as_euler("ZYX")[0])


def _grip(thing: Rotation, extent: np.ndarray, now: float) -> tuple[float, float]:
    """The gripper's yaw for the narrowest side of a box that is turned as `thing`, and how far it is from `now`."""
    turns = np.linspace(-np.pi / 2, np.pi / 2, 72, endpoint=False)
    closing = np.stack([-np.sin(now + turns), np.cos(now + turns), np.zeros_like(turns)])
    widths = extent @ np.abs(thing.as_matrix().T @ closing)
    best = float(turns[np.argmin(widths + _PER_RADIAN * np.abs(turns))])
    return now + best, best


def _command(simulation: Any, way: np.ndarray, yaw: float, *, opened: bool) -> np.ndarray:
    """The action that moves the gripper by `way` in metres, pointing down at `yaw` radians.

    Actions move the controller's target, which the gripper follows late and not quite; going `way` beyond it makes up
    for half of what is missing.
    """
    env = simulation.env
    base, target = env.agent.robot.pose, env.agent.controller.controllers["arm"]._target_pose
    beyond = place(simulation.hand) + 2 * way
    move = spin(base).inv().apply(beyond - place(base)) - place(target)
    wanted = spin(base).inv() * Rotation.from_euler("z", yaw) * _DOWN
    turn = (wanted * spin(target).inv()).as_euler("XYZ")
    move *= min(1.0, _STEP / max(float(np.linalg.norm(move)), 1e-9))
    return np.concatenate((move, np.clip(turn, -_TURN, _TURN), [float(opened)])).astype(np.float32)
