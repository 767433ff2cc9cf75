"""ManiSkill 3: table-top skills of a simulated Panda arm in SAPIEN.

Tao et al. 2024 (arXiv 2410.00425), by the package `mani_skill`; these six tasks need no downloads.

Physics runs on the processor, one robot for each environment, because only so are resets exact; pictures are drawn on
an NVIDIA GPU if there is one, else by Mesa's software Vulkan. ManiSkill hides from its cameras where PickCube's goal
is. Here the green ball is seen, for a policy that knows only pictures has no other way to find it.

Initial states are ManiSkill's own for the seed 3 i + k, where i is the index and k the place of the split among
demonstration, training and evaluation, so no two splits share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from perennial.errors import PerennialError, how_to_install, not_installed
from perennial.suites import base
from perennial.suites._maniskill.experts import EXPERTS
from perennial.suites._maniskill.install import prepare, renderer, software_driver
from perennial.suites._maniskill.tasks import SEQUENCES, TASKS


class ManiSkill(base.Suite):
    """Six table-top tasks of ManiSkill 3."""

    name: ClassVar[str] = "maniskill"
    tasks: Mapping[str, base.Task] = TASKS
    sequences: Mapping[str, base.Sequence] = SEQUENCES
    state_dim = 8
    steps_per_second = 200.0
    action_dim = 7

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> ManiSkillEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        base.require_known(self, self.name, [task], [variant])
        space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
        return ManiSkillEnvironment(self.tasks[task], simulator().table_top(task), space, image_size)

    def require_simulator(self) -> None:
        """See `Suite.require_simulator`."""
        base.require_package("mani_skill", "ManiSkill", "maniskill")

    def expert(self, task: str) -> base.Expert | None:
        """A scripted expert for the tasks with cubes."""
        base.require_known(self, self.name, [task])
        return EXPERTS.get(task)

    def doctor(self) -> list[Any]:
        """Whether ManiSkill and a Vulkan driver are here."""
        from perennial.doctor import Check, installed_version

        version = installed_version("mani_skill")
        if version is None:
            return [Check("ManiSkill", "warning", "not installed", how_to_install("maniskill"))]
        if renderer() == "gpu":
            return [Check("ManiSkill", "ok", f"{version}, draws on the GPU")]
        try:
            driver = software_driver()
        except PerennialError as error:
            return [Check("ManiSkill", "warning", f"{version} without Vulkan", str(error))]
        return [Check("ManiSkill", "ok", f"{version}, {driver}")]


def simulator() -> Any:
    """The module that imports ManiSkill.

    Raises:
        PerennialError: ManiSkill is not installed.
    """
    prepare()
    try:
        from perennial.suites._maniskill import simulation
    except ImportError as error:
        raise not_installed("ManiSkill", "maniskill", error) from error
    return simulation


class ManiSkillEnvironment(base.Environment):
    """One task; see `suites.base.Environment`.

    The proprioceptive state is float32 [8]: the hand's x, y, z in metres in the world, its orientation as a quaternion
    w, x, y, z with x >= 0, and the distance between the fingers in metres. Actions are float32 [7] in the range of
    `space`; values outside are clipped. Without options, `reset(seed=n)` goes to training state n.

    Those of the table-top tasks are in [-1, 1], ManiSkill's `pd_ee_delta_pose`: displacement of the hand (1 is 10 cm),
    its rotation about the axes of the base (1 is -0.1 radians: ManiSkill 3.0.1 turns against the sign), and the gripper
    (-1 closes, 1 opens).

    Args:
        task: what is to be done.
        simulation: a `Simulation` of it.
        space: of actions.
        image_size: side of the pictures that policies see.
    """

    action_space: gymnasium.spaces.Box

    def __init__(self, task: base.Task, simulation: Any, space: gymnasium.spaces.Box, image_size: int) -> None:
        self.task = task
        self.simulation = simulation
        self.action_space = space
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self._image_size = image_size
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see `suites.base.Environment`.

        Raises:
            PerennialError: unknown split.
        """
        super().reset(seed=seed)
        self.simulation.begin(base.state_number(*base.initial_state(seed, options)))
        self._steps = 0
        return self.simulation.state, {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step (50 ms, on the plate 200 ms); the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite.
        """
        base.require_finite(action)
        space = self.action_space
        success = self.simulation.advance(np.clip(action, space.low, space.high).astype(np.float32))
        self._steps += 1
        truncated = not success and self._steps >= self.task.horizon
        return self.simulation.state, float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The picture that policies see, of the task's own camera, uint8 [1, image_size, image_size, 3]."""
        seen: np.ndarray = self.simulation.look(self._image_size)
        return seen[None]

    def film(self, size: int) -> np.ndarray:
        """The scene for people, uint8 [size, size, 3]: from ManiSkill's own camera, on the plate what policies see."""
        seen: np.ndarray = self.simulation.film(size)
        return seen

    def close(self) -> None:
        """Free the simulation and its renderer."""
        self.simulation.close()
