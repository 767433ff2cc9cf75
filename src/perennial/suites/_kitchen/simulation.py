"""Franka Kitchen's simulations, made to start where they are told to; one compiled model serves all of a task.

Physics, control and success are those of gymnasium-robotics without its noise on observations, bit for bit. Imported
only when an environment is built, because it needs the simulator.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from typing import Any

import mujoco
import numpy as np

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

from perennial.randomness import stream
from perennial.suites._kitchen.tasks import DOORS, VARIANTS
from perennial.suites._mujoco import HIDDEN_GROUP

CAMERA = "left_cap"
"""The camera of the model that is put where gymnasium-robotics looks from."""
_LOOK_AT, _DISTANCE = np.array([-0.2, 0.5, 2.0]), 2.2
_ARM = slice(0, 7)
_ROBOT = slice(0, 9)
_KETTLE = slice(23, 25)
_RANGES = np.array([0.1] * 7 + [0.02] * 4)
"""Half ranges of what differs between initial states: radians of the arm's joints, metres of the robot's base sideways
and to the front, metres of the kettle likewise."""


@functools.cache
def original() -> Any:
    """gymnasium-robotics' own environment without noise, as the source of everything that is the same for all."""
    return kitchen_env.KitchenEnv(object_noise_ratio=0.0, robot_noise_ratio=0.0)


@functools.lru_cache(12)
def compiled(door: tuple[float, float, float] | None, variant: str, *, plain: bool) -> Any:
    """The `mujoco.MjModel` with a repainted sliding door; if not `plain`, the arm is drawn by its simple hulls."""
    model = copy.copy(original().model)
    model.vis.global_.offwidth = model.vis.global_.offheight = 64  # painters enlarge it; the file says 2560 by 1920
    shift = VARIANTS[variant]
    camera = model.camera(CAMERA).id
    model.cam_pos[camera], model.cam_quat[camera] = _pose(*shift.camera)
    headlight = model.vis.headlight
    for light in (model.light_diffuse, model.light_ambient, headlight.diffuse, headlight.ambient):
        light *= shift.light
    slider = model.body("slidelink").id
    for geom in range(model.ngeom):
        if door and model.geom_bodyid[geom] == slider and "blue" in model.mat(model.geom_matid[geom]).name:
            model.geom_matid[geom] = -1
            model.geom_rgba[geom, :3] = door
        mesh = model.geom_dataid[geom]
        if not plain and mesh >= 0 and model.body(model.geom_bodyid[geom]).name.startswith("panda0_link"):
            model.geom_group[geom] = 0 if model.mesh(mesh).name.endswith("_col") else HIDDEN_GROUP
    return model


def _pose(azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray]:
    """Position and quaternion of a camera that looks at the kitchen from these angles in degrees."""
    around, up = math.radians(azimuth), math.radians(elevation)
    forward = np.array([math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up)])
    right = np.array([math.sin(around), -math.cos(around), 0.0])
    axes = np.column_stack((right, np.cross(right, forward), -forward))
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    return _LOOK_AT - _DISTANCE * forward, quaternion


class Simulation:
    """One robot in one kitchen.

    Attributes:
        model: shared by the simulations of a task and variant; only the place of the robot's base differs.
        data: `mujoco.MjData`.
    """

    def __init__(self, task: str, variant: str) -> None:
        self._task, self._variant = task, variant
        self.model = compiled(DOORS.get(task), variant, plain=False)
        self.data = mujoco.MjData(self.model)
        robot = original().robot_env
        self._limits = robot.robot_pos_bound[_ROBOT].T
        self._reach = robot.act_rng * robot.dt
        self._frames = robot.frame_skip
        self._stand = self.model.body("panda0_link0").parentid[0]
        self._base = self.model.body_pos[self._stand].copy()
        self._indices, self._goal = _goal(task)

    def film_model(self) -> Any:
        """The model as people see it."""
        return compiled(DOORS.get(self._task), self._variant, plain=True)

    def begin(self, split: str, index: int) -> None:
        """Go to initial state `index` of `split`, whatever happened before."""
        rng = stream(0, "initial state", "kitchen", self._task, self._variant, split, index)
        inner, outer = VARIANTS[self._variant].shell
        point = rng.uniform(-1, 1, len(_RANGES))
        count = len(point)
        point *= rng.uniform(inner**count, outer**count) ** (1 / count) / np.abs(point).max()
        moved = _RANGES * point
        mujoco.mj_resetData(self.model, self.data)
        robot = original().robot_env
        self.data.qpos[:], self.data.qvel[:] = robot.init_qpos, robot.init_qvel
        self.data.qpos[_ARM] += moved[:7]
        self.data.qpos[_KETTLE] += moved[9:]
        self._base = np.append(moved[7:9], robot.model.body_pos[self._stand, 2])
        self.take_place()
        mujoco.mj_forward(self.model, self.data)

    def take_place(self) -> None:
        """Put the robot's base of the shared model where this simulation has it."""
        self.model.body_pos[self._stand] = self._base

    def advance(self, action: np.ndarray) -> bool:
        """One control step of 80 ms with `action`, float [9] in [-1, 1]; whether the task is solved."""
        self.take_place()
        self.data.ctrl[:] = np.clip(self.data.qpos[_ROBOT] + action * self._reach, *self._limits)
        mujoco.mj_step(self.model, self.data, nstep=self._frames)
        return bool(np.linalg.norm(self.data.qpos[self._indices] - self._goal) < kitchen_env.BONUS_THRESH)


def _goal(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Where in `qpos` the thing of the task is, and what it must be there."""
    element = task.removesuffix("-red").removesuffix("-yellow").replace("-", " ")
    return kitchen_env.OBS_ELEMENT_INDICES[element], kitchen_env.OBS_ELEMENT_GOALS[element]
