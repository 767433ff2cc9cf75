"""Meta-World's simulations, made to start where they are told to and to do no needless work.

Imported only when an environment is built, because it needs the simulator.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import metaworld.policies
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from perennial.randomness import stream
from perennial.suites._metaworld_variants import CAMERA, VARIANTS
from perennial.suites._mujoco import HIDDEN_GROUP

_CONSTANT = 0.01  # metres; Meta-World writes constants as reset ranges narrower than this
_ARM = {"pedestal", "torso", "head", "screen", "controller_box", "pedestal_feet", "right_arm_base_link"}


@functools.cache
def compiled(path: str, variant: str) -> Any:
    """The `mujoco.MjModel` of the XML file at `path`, changed for `variant`; to be copied, not used."""
    model = mujoco.MjModel.from_xml_path(path)
    shift = VARIANTS[variant]
    for geom in range(model.ngeom):
        body = model.body(model.geom_bodyid[geom]).name
        if body in _ARM or body.startswith("right_l"):
            model.geom_group[geom] = HIDDEN_GROUP
    model.cam_pos[model.camera(CAMERA).id] = shift.camera
    for light in (model.light_diffuse, model.light_ambient, model.vis.headlight.diffuse, model.vis.headlight.ambient):
        light *= shift.light
    model.mat_rgba[:, :3] *= shift.colours
    plain = model.geom_matid < 0  # a geometry that names a material takes its colour from there
    model.geom_rgba[plain, :3] *= shift.colours
    return model


class Simulation:
    """What is changed in a Meta-World environment; mixed in before the environment's own class.

    Attributes:
        observation: Meta-World's own, float64 [39], with the goal visible.
    """

    observation: np.ndarray
    model: Any
    data: Any

    def __init__(self, task: str, variant: str) -> None:
        self._task = task
        self._variant = variant
        self._settling = True
        super().__init__()
        self._set_task_called = True
        self._partially_observable = False
        self.__dict__.pop("sawyer_observation_space", None)  # cached while the goal was hidden: it would clip it to 0
        self._start = {name: getattr(self.model, name).copy() for name in ("body_pos", "body_quat", "site_pos")}

    def _initialize_simulation(self) -> tuple[Any, Any]:
        """A copy of the compiled model, because compiling takes a quarter of a second."""
        model = self.pristine()
        return model, mujoco.MjData(model)

    def pristine(self) -> Any:
        """A fresh copy of the compiled model."""
        return copy.copy(compiled(self.fullpath, self._variant))  # type: ignore[attr-defined]

    def begin(self, split: str, index: int) -> None:
        """Go to initial state `index` of `split`, whatever happened before.

        Meta-World resets twice, and the second time starts where the first one has put things. The first time is
        done here without settling the hand, which would change nothing that lasts.
        """
        for name, value in self._start.items():
            getattr(self.model, name)[:] = value
        for self._settling in (False, True):
            self._rng = stream(0, "initial state", "metaworld", self._task, self._variant, split, index)
            mujoco.mj_resetData(self.model, self.data)
            self.observation = self.reset_model()  # type: ignore[attr-defined]
        self.curr_path_length = 0
        self._prev_obs = self.observation[:18].copy()
        self.observation[18:36] = self._prev_obs

    def _reset_hand(self, steps: int = 50) -> None:
        if self._settling:
            super()._reset_hand(steps)  # type: ignore[misc]
        else:
            self.init_tcp = self.tcp_center  # type: ignore[attr-defined]

    def _get_state_rand_vec(self) -> np.ndarray:
        """A point of the reset space in the shell of the variant.

        The direction is uniform in the scaled cube, the distance uniform in the shell's volume.
        """
        space = self._random_reset_space  # type: ignore[attr-defined]
        centre, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        point = self._rng.uniform(-1, 1, len(centre))
        free = half > _CONSTANT / 2
        inner, outer = VARIANTS[self._variant].shell
        distance = self._rng.uniform(inner ** free.sum(), outer ** free.sum()) ** (1 / max(free.sum(), 1))
        if free.any():
            point[free] *= distance / np.abs(point[free]).max()
        self._last_rand_vec = centre + half * point
        return self._last_rand_vec

    def advance(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        self.observation, _, _, _, info = self.step(action)
        return bool(info["success"])


@functools.cache
def _class(task: str) -> type[Simulation]:
    return type(Simulation.__name__, (Simulation, ALL_V3_ENVIRONMENTS[task]), {})


def simulation(task: str, variant: str) -> Simulation:
    """Build the simulation of `task`."""
    return _class(task)(task, variant)


class ScriptedExpert:
    """Meta-World's scripted policy of `task`."""

    def __init__(self, task: str) -> None:
        self._policy = metaworld.policies.ENV_POLICY_MAP[task]()

    def __call__(self, environment: Any) -> np.ndarray:
        """The action in the environment's present state, float32 [4], clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns whenever clipping is needed
            action = self._policy.get_action(environment.privileged())
        return np.clip(action, -1, 1).astype(np.float32)
