"""Meta-World's simulations, made to start where they are told to and to do no needless work.

Physics, observations of positions and success are those of Meta-World, bit for bit. Left out are rewards for grasping,
orientations that no expert and no success test reads, and the settling of the hand when an initial state returns.
Imported only when an environment is built, because it needs the simulator.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import metaworld.policies
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from perennial.randomness import stream
from perennial.suites._metaworld.variants import CAMERA, VARIANTS
from perennial.suites._mujoco import HIDDEN_GROUP

_CONSTANT = 0.01  # metres; Meta-World writes constants as reset ranges narrower than this
_UNSEEN = {"controller_box", "pedestal_feet", "torso", "pedestal", "right_arm_base_link", "head", "screen"}
_PLACES = ("body_pos", "site_pos")  # all that resets change in a model
_MODELS = 16
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_SETTLED_LIMIT = 10_000  # states of about 1 kB

_settled: dict[tuple[str, str, str, int], np.ndarray] = {}
"""For each initial state, the state of the physics one control step before the hand has settled."""


def _hidden(model: Any, geom: int) -> bool:
    """Whether policies do not see the geometry: the arm, the housing of the hand and the floor of the room.

    They are three quarters of the triangles and pixels to draw, and carry no information about any task.
    """
    body = model.body(model.geom_bodyid[geom]).name
    housing = body == "right_hand" and model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH
    return body in _UNSEEN or body.startswith("right_l") or housing or model.geom(geom).name == "floor"


class SharedModel:
    """A compiled model of 22 MB that the environments of a task use in turn, each with its own places of things.

    Attributes:
        model: the `mujoco.MjModel` of the XML file at `path`, changed for `variant`.
        original: its `_PLACES` as compiled.
        user: whose places are in the model.
    """

    def __init__(self, path: str, variant: str) -> None:
        model = mujoco.MjModel.from_xml_path(path)
        shift = VARIANTS[variant]
        for geom in range(model.ngeom):
            if _hidden(model, geom):
                model.geom_group[geom] = HIDDEN_GROUP
        model.cam_pos[model.camera(CAMERA).id] = shift.camera
        headlight = model.vis.headlight
        for light in (model.light_diffuse, model.light_ambient, headlight.diffuse, headlight.ambient):
            light *= shift.light
        model.mat_rgba[:, :3] *= shift.colours
        plain = model.geom_matid < 0  # a geometry that names a material takes its colour from there
        model.geom_rgba[plain, :3] *= shift.colours
        self.model = model
        self.original = self.places()
        self.user: object = None

    def places(self) -> tuple[np.ndarray, ...]:
        """Copies of the arrays that say where things are."""
        return tuple(getattr(self.model, name).copy() for name in _PLACES)

    def lend(self, user: object, places: tuple[np.ndarray, ...]) -> None:
        """Put the things where `user` has them."""
        for name, value in zip(_PLACES, places, strict=True):
            getattr(self.model, name)[:] = value
        self.user = user


compiled = functools.lru_cache(_MODELS)(SharedModel)
"""Compiling takes a quarter of a second, so models are kept after their environments are closed."""


class Simulation(SawyerXYZEnv):  # type: ignore[misc]
    """What is changed in every Meta-World environment; put before the class of the task.

    Attributes:
        observation: Meta-World's own, float64 [39], with the goal visible.
    """

    observation: np.ndarray

    def __init__(self, task: str, variant: str) -> None:
        self._task = task
        self._variant = variant
        self._initial = ("", 0)
        self._settling = True
        self._me = object()
        self._views: dict[str, np.ndarray] = {}
        super().__init__()
        self._set_task_called = True
        self._partially_observable = False
        self.__dict__.pop("sawyer_observation_space", None)  # cached while the goal was hidden: it would clip it to 0
        self._low, self._high = self.sawyer_observation_space.low, self.sawyer_observation_space.high

    def _initialize_simulation(self) -> tuple[Any, Any]:
        self._shared = compiled(self.fullpath, self._variant)
        return self._shared.model, mujoco.MjData(self._shared.model)

    def begin(self, split: str, index: int) -> None:
        """Go to initial state `index` of `split`, whatever happened before.

        Meta-World resets twice, and the second time starts where the first one has put things. The first time is
        done here without settling the hand, which would leave no trace.
        """
        self._initial = (split, index)
        self._shared.lend(self._me, self._shared.original)
        for self._settling in (False, True):
            self._rng = stream(0, "initial state", "metaworld", self._task, self._variant, split, index)
            mujoco.mj_resetData(self.model, self.data)
            if not self._settling:
                mujoco.mj_forward(self.model, self.data)  # settling does it too, by moving
            self.observation = self.reset_model()
        self._places = self._shared.places()
        self._prev_obs = self.observation[:18].copy()
        self.observation[18:36] = self._prev_obs

    def _reset_hand(self, steps: int = 50) -> None:
        if not self._settling:
            self.init_tcp = self.tcp_center
            return
        key = (self._task, self._variant, *self._initial)
        if key in _settled:
            mujoco.mj_setState(self.model, self.data, _settled[key], _STATE)
        else:
            super()._reset_hand(steps - 1)
            state = np.empty(mujoco.mj_stateSize(self.model, _STATE))
            mujoco.mj_getState(self.model, self.data, state, _STATE)
            if len(_settled) >= _SETTLED_LIMIT:
                _settled.clear()
            _settled[key] = state
        super()._reset_hand(1)

    def _get_state_rand_vec(self) -> np.ndarray:
        """A point of the reset space in the shell of the variant, uniform in the shell's volume."""
        space = self._random_reset_space
        centre, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        point = self._rng.uniform(-1, 1, len(centre))
        free = half > _CONSTANT / 2
        inner, outer = VARIANTS[self._variant].shell
        distance = self._rng.uniform(inner ** free.sum(), outer ** free.sum()) ** (1 / free.sum())
        point[free] *= distance / np.abs(point[free]).max()
        vector: np.ndarray = centre + half * point
        self._last_rand_vec = vector
        return vector

    def advance(self, action: np.ndarray) -> bool:
        """One control step with `action`, float32 [4] in [-1, 1]; whether the task is solved."""
        if self._shared.user is not self._me:
            self._shared.lend(self._me, self._places)
        data = self.data
        data.mocap_pos[0] = np.clip(data.mocap_pos[0] + action[:3] * self.action_scale, self.mocap_low, self.mocap_high)
        data.mocap_quat[:] = (1, 0, 1, 0)
        data.ctrl[:] = (action[3], -action[3])
        mujoco.mj_step(self.model, data, nstep=self.frame_skip)
        mujoco.mj_forward(self.model, data)
        self.observation = np.minimum(np.maximum(self._get_obs(), self._low), self._high)
        return bool(self.evaluate_state(self.observation, action)[1]["success"])

    def _get_obs(self) -> np.ndarray:
        now = self._get_curr_obs_combined_no_goal()
        observation = np.concatenate((now, self._prev_obs, self._get_pos_goal()))
        self._prev_obs = now
        return observation

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        now = np.zeros(18)
        now[:3] = self.get_body_com("hand")
        gap = self.get_body_com("rightclaw") - self.get_body_com("leftclaw")
        now[3] = min(math.sqrt(gap.dot(gap)) / 0.1, 1.0)
        objects = now[4:].reshape(2, 7)  # position of each, and its orientation, which stays zero
        places = self._get_pos_objects().reshape(-1, 3)
        objects[: len(places), :3] = places
        return now

    def get_body_com(self, body_name: str) -> np.ndarray:
        """The position of a body, float64 [3], a view into the simulation."""
        if body_name not in self._views:
            self._views[body_name] = self.data.body(body_name).xpos
        return self._views[body_name]

    def get_endeff_pos(self) -> np.ndarray:
        """The position of the hand, float64 [3], a view into the simulation."""
        return self.get_body_com("hand")

    def _gripper_caging_reward(self, *_: Any, **__: Any) -> float:
        return 0.0

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both fingers press on a geometry."""
        pairs = self.data.contact.geom
        touching = (pairs == object_geom_id).any(1)
        if not touching.any():
            return False
        force = self.data.efc_force
        address = self.data.contact.efc_address
        pads = (self.data.geom(name).id for name in ("leftpad_geom", "rightpad_geom"))
        return all(force[address[touching & (pairs == pad).any(1)]].sum() > 0 for pad in pads)


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
        clipped: np.ndarray = np.clip(action, -1, 1).astype(np.float32)
        return clipped
