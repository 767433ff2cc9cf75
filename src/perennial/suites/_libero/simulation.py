"""LIBERO's simulations, made to start where they are told to and to do no needless work.

Physics, states and pictures are those of LIBERO's own environment, bit for bit; left out are the observations of
robosuite that nobody reads. A robosuite environment is slow to build and large, so the environments of a task share
one, each with its own state. Imported only when an environment is built, after `install.prepare`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mujoco
import numpy as np
import robosuite
import robosuite.utils.transform_utils as rotations
import torch
from libero.libero.envs import TASK_MAPPING, bddl_utils
from robosuite.utils.errors import RandomizationError

from perennial.randomness import integer_seed, stream
from perennial.suites._libero.install import incomplete, package
from perennial.suites._libero.tasks import location
from perennial.suites._libero.variants import EPISODES_PER_LAYOUT, LAYOUTS, Shift, rewritten, shift
from perennial.suites._mujoco import Painter, borrow, give_back

FOLDER = package()

SETTLING = 10
"""Control steps at rest before an episode begins, as in OpenVLA's evaluation."""
REST = np.array([0.0] * 6 + [-1.0])
SEEN_AT = 24
"""What a control step returns is sampled by robosuite after this many of its 25 physics steps."""
CAMERA = "agentview"
_COLLISION_GROUP, _UNDRAWN_GROUP = 0, 4
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_SCENES = 6
_SETTLED_LIMIT = 10_000  # states of a few kB
_SAFE: list[Any] = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    np.dtypes.Float64DType,
]

Key = tuple[str, str, str, int]
"""Task, variant, and for layouts of distractors the split and number."""

Controls = tuple[Mapping[str, Any], np.ndarray]


@dataclass(frozen=True)
class Moment:
    """All that the future of a simulation depends on, in any scene with the same key.

    Attributes:
        physics: MuJoCo's integration state.
        controls: see `Scene.controls`.
        places: see `Scene.places`.
    """

    physics: np.ndarray
    controls: Controls
    places: tuple[np.ndarray, ...]


class Scene:
    """A robosuite environment without cameras that the simulations of a task use in turn.

    Attributes:
        env: the robosuite environment.
        model: its `mujoco.MjModel`.
        original: how LIBERO leaves it after a reset with seed 0, which is what stored states are put into.
        user: the simulation whose state is in it.
        holders: simulations that use it; `players` are those in the middle of an episode.
    """

    def __init__(self, key: Key) -> None:
        task, variant, split, layout = key
        change = shift(task, variant)
        with seeded(0):
            self.env = _build(_problem(task, change, stream(0, "libero layout", task, variant, split, layout)))
            self.sim = self.env.sim
            self.model: Any = self.sim.model._model
            if any(change.robot):
                self.model.body_pos[self.model.body("robot0_base").id] += change.robot
                self.env._reset_internal()
        self.key = key
        self.robot = self.env.robots[0]
        self.sim.forward()
        self.env.visualize(dict.fromkeys(self.env._visualizations, False))
        self._look(change)
        self.canvas = mujoco.MjData(self.model)
        self.painters: dict[int, Painter] = {}
        self.user: Simulation | None = None
        self.holders: set[Simulation] = set()
        self.players: set[Simulation] = set()
        self.original = self.moment()

    def _look(self, change: Shift) -> None:
        self.model.geom_group[self.model.geom_group == _COLLISION_GROUP] = _UNDRAWN_GROUP
        camera = self.model.camera(CAMERA).id
        if change.view:
            self.model.cam_pos[camera], self.model.cam_quat[camera] = change.view
        self.model.cam_pos[camera] += change.camera
        headlight = self.model.vis.headlight
        for light in (self.model.light_diffuse, self.model.light_ambient, headlight.diffuse, headlight.ambient):
            light *= change.light

    def places(self) -> tuple[np.ndarray, ...]:
        """Copies of what an episode changes in the model: where fixtures stand, and whether the stove glows."""
        return self.model.body_pos.copy(), self.model.body_quat.copy(), self.model.site_rgba.copy()

    def put(self, places: tuple[np.ndarray, ...]) -> None:
        """The inverse of `places`."""
        self.model.body_pos[:], self.model.body_quat[:], self.model.site_rgba[:] = places

    def controls(self) -> Controls:
        """What the controller remembers, but not the simulation that it looks at, and what the gripper has reached.

        robosuite replaces these values and never changes them in place.
        """
        memory = {name: value for name, value in vars(self.robot.controller).items() if name != "sim"}
        return memory, self.robot.gripper.current_action

    def control(self, controls: Controls) -> None:
        """The inverse of `controls`."""
        memory, self.robot.gripper.current_action = controls
        vars(self.robot.controller).update(memory)

    def moment(self) -> Moment:
        """The present state."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.sim.data._data, physics, _STATE)
        return Moment(physics, self.controls(), self.places())

    def restore(self, moment: Moment) -> None:
        """Go back to `moment`; what follows from its state is computed by the next step."""
        mujoco.mj_resetData(self.model, self.sim.data._data)
        mujoco.mj_setState(self.model, self.sim.data._data, moment.physics, _STATE)
        self.control(moment.controls)
        self.put(moment.places)

    def load(self, stored: np.ndarray) -> None:
        """Go to one of LIBERO's stored states: time, positions, velocities."""
        self.restore(self.original)
        self.sim.set_state_from_flattened(stored)
        self.sim.forward()
        self.env._check_success()
        self.env._post_process()

    @functools.cached_property
    def _unplaced(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Where fixtures are before LIBERO places them, which is where it believes them when it places other things."""
        fresh = mujoco.MjModel.from_xml_string(self.env.model.get_xml())
        roots = [fixture.root_body for fixture in self.env.fixtures_dict.values() if hasattr(fixture, "root_body")]
        return {fresh.body(root).id: (fresh.body(root).pos.copy(), fresh.body(root).quat.copy()) for root in roots}

    def draw(self, seed: int) -> None:
        """Go to a state drawn from the regions in which LIBERO's problem lets things begin."""
        self.restore(self.original)
        for body, (position, orientation) in self._unplaced.items():
            self.model.body_pos[body], self.model.body_quat[body] = position, orientation
        drawn = False
        with seeded(seed):
            while not drawn:
                self.sim.reset()
                with suppress(RandomizationError):
                    self.env._reset_internal()
                    drawn = True
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        self.sim.forward()
        self.env._post_process()

    def paint(self, camera: str, size: int) -> np.ndarray:
        """The picture of what is on the canvas, uint8 [size, size, 3], as LIBERO's own renderer draws it."""
        if size not in self.painters:
            key = (*self.key, size)
            self.painters[size] = borrow(key, lambda: Painter(self.model, CAMERA, size, fast=False))
        return self.painters[size].paint(self.canvas, camera)

    def free(self) -> None:
        """Free the renderers."""
        while self.painters:
            give_back((*self.key, self.painters.popitem()[0]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """NumPy's global stream, from which LIBERO draws, begins with `seed` and is left as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _problem(task: str, change: Shift, rng: np.random.Generator) -> str:
    folder, file = location(task)
    text = (FOLDER / "bddl_files" / folder / f"{file}.bddl").read_text()
    return rewritten(text, change, rng)


def _build(problem: str) -> Any:
    """LIBERO's environment of a problem, as its `OffScreenRenderEnv` makes it, but without cameras.

    Raises:
        PerennialError: a file of the assets is missing or damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.bddl"
        path.write_text(problem)
        kind = TASK_MAPPING[bddl_utils.get_problem_info(str(path))["problem_name"]]
        try:
            return kind(
                str(path),
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_offscreen_renderer=False,
                control_freq=20,
                ignore_done=True,
            )
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise incomplete(error) from error


@functools.cache
def stored_states(task: str) -> np.ndarray:
    """LIBERO's fifty initial states of `task`, float64 [50, 1 + positions + velocities]."""
    folder, file = location(task)
    with torch.serialization.safe_globals(_SAFE):
        states = torch.load(FOLDER / "init_files" / folder / f"{file}.pruned_init", weights_only=True)
    return np.asarray(states)


_scenes: dict[Key, Scene] = {}
"""In the order in which they were asked for last."""
_settled: dict[tuple[str, str, str, int], Moment] = {}
"""For each initial state, the moment one control step before all has settled."""


def scene(key: Key) -> Scene:
    """The scene called `key`; of more than `_SCENES`, those that nobody plays in are dropped."""
    found = _scenes.pop(key, None) or Scene(key)
    _scenes[key] = found
    for old in list(_scenes.values())[:-1]:
        if len(_scenes) > _SCENES and not old.players:
            for holder in tuple(old.holders):
                holder.leave()
            del _scenes[old.key]
    return found


class Simulation:
    """One simulated task with its own state; see `Scene`.

    Attributes:
        state: what a policy feels, float64 [8]: position of the hand in metres, its orientation as an axis times an
            angle in radians, the places of both fingers in metres.
    """

    state: np.ndarray

    def __init__(self, task: str, variant: str, stored: Mapping[str, range]) -> None:
        self._task, self._variant = task, variant
        self._change = shift(task, variant)
        self._stored = {} if self._change.rewrites else stored
        self._scene: Scene | None = None
        self._data: Any = None
        self._paused: tuple[Controls, tuple[np.ndarray, ...]] | None = None

    def begin(self, split: str, index: int) -> None:
        """Go to initial state `index` of `split`, whatever happened before."""
        layouts = bool(self._change.distractors)
        layout = index // EPISODES_PER_LAYOUT % LAYOUTS if layouts else 0
        self._enter((self._task, self._variant, split if layouts else "", layout))
        numbers = self._stored.get(split)
        key = (self._task, self._variant, split, index)
        if numbers is not None:
            key = (self._task, self._variant, "stored", numbers[index % len(numbers)])
        here = self.present()
        if key in _settled:
            here.restore(_settled[key])
        else:
            if numbers is None:
                here.draw(integer_seed(0, "initial state", "libero", *key) % 2**32)
            else:
                here.load(stored_states(self._task)[key[-1]])
            for _ in range(SETTLING - 1):
                self.advance(REST)
            if len(_settled) >= _SETTLED_LIMIT:
                _settled.clear()
            _settled[key] = here.moment()
        self.advance(REST)

    def _enter(self, key: Key) -> None:
        wanted = scene(key)
        if self._scene is not wanted:
            self.leave()
            self._scene, self._data = wanted, mujoco.MjData(wanted.model)
        wanted.holders.add(self)
        wanted.players.add(self)

    def leave(self) -> None:
        """Let go of the scene; its renderers are freed with the last simulation that uses it."""
        here, self._scene = self._scene, None
        if here is not None:
            self.end()
            here.holders.discard(self)
            if here.user is self:
                here.user = None
            self._data = self._paused = None
            if not here.holders:
                here.free()

    def end(self) -> None:
        """The episode has ended."""
        if self._scene is not None:
            self._scene.players.discard(self)

    def present(self) -> Scene:
        """The scene, with this simulation's state in it."""
        here = self._scene
        if here is None:
            raise RuntimeError("reset the environment first")
        if here.user is not self:
            if here.user is not None:
                here.user._pause(here)
            here.user, here.sim.data._data = self, self._data
            if self._paused:
                controls, places = self._paused
                here.control(controls)
                here.put(places)
        return here

    def _pause(self, here: Scene) -> None:
        self._paused = here.controls(), here.places()

    def advance(self, action: np.ndarray) -> bool:
        """One control step with `action`, float [7] in [-1, 1]; whether the task is solved."""
        here = self.present()
        for number in range(1, round(here.env.control_timestep / here.env.model_timestep) + 1):
            here.sim.forward()
            here.env._pre_action(action, number == 1)
            if number == SEEN_AT:
                self._seen = self._data.qpos.copy(), here.places()
            here.sim.step()
            if number == SEEN_AT:
                self.state = self._sense(here)
        success = bool(here.env._check_success())
        here.env._post_process()
        return success

    def _sense(self, here: Scene) -> np.ndarray:
        robot = here.robot
        hand = self._data.site_xpos[robot.eef_site_id]
        turn = rotations.quat2axisangle(np.roll(self._data.body(robot.robot_model.eef_name).xquat, -1))
        return np.concatenate((hand, turn, self._data.qpos[robot._ref_gripper_joint_pos_indexes]))

    def picture(self, camera: str, size: int) -> np.ndarray:
        """What `camera` saw when `state` was sensed, uint8 [size, size, 3]."""
        here = self.present()
        positions, places = self._seen
        now = here.places()
        here.put(places)
        here.canvas.qpos[:] = positions
        mujoco.mj_kinematics(here.model, here.canvas)
        mujoco.mj_comPos(here.model, here.canvas)
        mujoco.mj_camlight(here.model, here.canvas)
        painted = here.paint(camera, size)
        here.put(now)
        return painted
