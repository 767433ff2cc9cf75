"""LIBERO: 130 tasks of a simulated Panda arm on tables, in kitchens and living rooms, with language.

Liu et al. 2023 (arXiv 2306.03310) through `hf-libero`. A task is called by its suite and place: `spatial-0`,
`object-5`, `goal-3`, `long-7` (libero_10) and `90-42`. LIBERO stores fifty initial states of each task; forty are for
training and ten for evaluation. Demonstrations begin in states drawn from the regions of LIBERO's problem files.

Actions are LIBERO's own: the last number opens the gripper at -1 and closes it at +1. OpenVLA's policies and the data
they learned from say 0 for closed and 1 for open, so who acts with them must give -sign(2g - 1); the state needs no
change. Pictures are LIBERO's, rotated by 180 degrees as OpenVLA does, which shows the scene as in a mirror.

LIBERO's meshes and textures do not come with `hf-libero`: set PERENNIAL_LIBERO_ASSETS to the folder that has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import numpy as np
from packaging.version import Version

from perennial.errors import PerennialError, how_to_install, not_installed, unknown
from perennial.suites import base
from perennial.suites._libero import expert as libero_expert
from perennial.suites._libero.install import LAST_MUJOCO, ROBOSUITE, assets, prepare
from perennial.suites._libero.tasks import HORIZONS, SEQUENCES, tasks
from perennial.suites._libero.variants import PERTURBED, shift

THIRD_PERSON, WRIST = "agentview", "robot0_eye_in_hand"


@dataclass(frozen=True)
class Protocol:
    """How LIBERO is used.

    Attributes:
        cameras: that a policy sees.
        stored: numbers of LIBERO's stored states by split; other splits draw new ones.
        tasks: by name.
        variants: names, see `_libero.variants`.
    """

    cameras: tuple[str, ...] = (THIRD_PERSON,)
    stored: Mapping[str, range] = field(default_factory=lambda: {"training": range(40), "evaluation": range(40, 50)})
    tasks: Mapping[str, base.Task] = field(default_factory=lambda: tasks(HORIZONS, published=False))
    variants: tuple[str, ...] = tuple(PERTURBED)


class Libero(base.Suite):
    """LIBERO with the horizons of OpenVLA's evaluation, disjoint initial states, and one camera."""

    name: ClassVar[str] = "libero"
    protocol: ClassVar[Protocol] = Protocol()
    sequences: Mapping[str, base.Sequence] = SEQUENCES
    state_dim = 8
    action_dim = 7
    steps_per_second = 70.0

    @property
    def tasks(self) -> Mapping[str, base.Task]:  # type: ignore[override]
        """By name."""
        return self.protocol.tasks

    @property
    def variants(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names."""
        return self.protocol.variants

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> LiberoEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        if task not in self.tasks:
            raise unknown("LIBERO task", task, self.tasks)
        if variant not in self.variants:
            raise unknown("LIBERO variant", variant, self.variants)
        shift(task, variant)
        return LiberoEnvironment(self.tasks[task], variant, image_size, self.protocol)

    def check(self, task: str, variant: str = "id") -> None:
        """The variant is one of this task's; see `Suite.check`."""
        shift(task, variant)

    def require_simulator(self) -> None:
        """LIBERO and its assets are here; see `Suite.require_simulator`."""
        assets()

    def states(self, task: str, split: base.Split, variant: str = "id") -> int | None:
        """As many as are stored, unless the variant rewrites the problem file; see `Suite.states`."""
        stored = self.protocol.stored.get(split)
        return None if stored is None or shift(task, variant).rewrites else len(stored)

    def expert(self, task: str) -> base.Expert | None:
        """A scripted expert for the tasks of spatial and object."""
        if task not in self.tasks:
            raise unknown("LIBERO task", task, self.tasks)
        return libero_expert.PickAndPlace() if task in libero_expert.TASKS else None

    def doctor(self) -> list[Any]:
        """One check for all suites of LIBERO."""
        return [_installation()] if self.name == Libero.name else []


def _installation() -> Any:
    """Whether LIBERO, its assets and the releases that it needs are here, for `perennial doctor`."""
    from perennial.doctor import Check, installed_version

    version, robosuite, mujoco = map(installed_version, ("hf-libero", "robosuite", "mujoco"))
    if version is None:
        return Check("LIBERO", "warning", "not installed", how_to_install("libero"))
    if robosuite != ROBOSUITE:
        finding = f"{version} with robosuite {robosuite} instead of {ROBOSUITE}"
        return Check("LIBERO", "problem", finding, how_to_install("libero"))
    if mujoco and Version(mujoco) > Version(LAST_MUJOCO):
        finding = f"{version} with MuJoCo {mujoco}, which draws it darker than {LAST_MUJOCO} and lowers success rates"
        return Check("LIBERO", "problem", finding, "In a fresh environment: pip install 'mujoco==3.3.0'")
    try:
        found = assets()
    except PerennialError as error:
        return Check("LIBERO", "warning", f"{version} without its assets", str(error))
    return Check("LIBERO", "ok", f"{version}, assets in {found}")


def _simulator() -> Any:
    """The module that imports LIBERO."""
    try:
        prepare()
        from perennial.suites._libero import simulation as libero_simulation
    except ImportError as error:
        raise not_installed("LIBERO", "libero", error) from error
    return libero_simulation


class LiberoEnvironment(base.Environment):
    """One LIBERO task; see `suites.base.Environment`.

    The proprioceptive state is float32 [8]: the hand's x, y, z in metres, its orientation as an axis times an angle in
    radians, and the places of both fingers in metres. Actions are float32 [7] in [-1, 1]: displacement of the hand (1
    is 5 cm), its rotation as an axis times an angle (1 is 0.5 radians), and the gripper (-1 opens, 1 closes); values
    outside are clipped. Without options, `reset(seed=n)` goes to training state n.

    Attributes:
        steps: environment steps since the last reset.
    """

    def __init__(self, task: base.Task, variant: str, image_size: int, protocol: Protocol) -> None:
        self.task = task
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self._image_size = image_size
        self._cameras = protocol.cameras
        self.simulation = _simulator().Simulation(task.name, variant, protocol.stored)
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see `suites.base.Environment`.

        A split with stored states returns to its first one after its last.

        Raises:
            PerennialError: unknown split.
        """
        super().reset(seed=seed)
        split, index = base.initial_state(seed, options)
        self.simulation.begin(split, index)
        self.steps = 0
        return self.simulation.state.astype(np.float32), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step of 50 ms; the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite.
        """
        base.require_finite(action)
        success = self.simulation.advance(np.clip(action, -1, 1).astype(np.float64))
        self.steps += 1
        truncated = not success and self.steps >= self.task.horizon
        if success or truncated:
            self.simulation.end()
        state = self.simulation.state.astype(np.float32)
        return state, float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The pictures that policies see, uint8 [cameras, image_size, image_size, 3], the third person's first."""
        seen = [self.simulation.picture(camera, self._image_size) for camera in self._cameras]
        return np.stack(seen)[:, :, ::-1].copy()

    def film(self, size: int) -> np.ndarray:
        """The third person's view, not mirrored, uint8 [size, size, 3]."""
        picture: np.ndarray = self.simulation.picture(THIRD_PERSON, size)
        return picture

    def close(self) -> None:
        """Let go of the simulation; renderers are freed with the last environment that uses them."""
        self.simulation.leave()
