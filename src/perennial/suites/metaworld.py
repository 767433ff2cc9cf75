"""Meta-World: fifty table-top skills of one simulated arm, with scripted experts.

Yu et al. 2019 (arXiv 1910.10897), version 3 of the tasks. The policy sees one camera (`corner2` at the position that
Meta-World's users have settled on, without the meshes of the arm above the hand) and four numbers of proprioception.

Initial states are drawn from each task's own reset space. Scaled to the cube [-1, 1], the space is cut into nested
shells by the largest coordinate: variant "id" lies within 0.8, "ood_val" between 0.8 and 0.9, "ood_test" between 0.9
and 1. The two shifted variants also move the camera and change light and colours, each in its own way. Variant "narrow"
is the inner part of "id", within 0.3: a laboratory in which a few demonstrations might be recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from perennial.errors import how_to_install, not_installed
from perennial.suites import base
from perennial.suites._metaworld.tasks import SEQUENCES, TASKS
from perennial.suites._metaworld.variants import CAMERA, VARIANTS
from perennial.suites._mujoco import Painter, borrow, choose_gl, give_back


class MetaWorld(base.Suite):
    """The fifty tasks of Meta-World version 3."""

    name: ClassVar[str] = "metaworld"
    tasks: Mapping[str, base.Task] = TASKS
    sequences: Mapping[str, base.Sequence] = SEQUENCES
    variants = tuple(VARIANTS)
    state_dim = 4
    action_dim = 4
    steps_per_second = 4000.0

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> MetaWorldEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        base.require_known(self, self.name, [task], [variant])
        return MetaWorldEnvironment(self.tasks[task], variant, image_size)

    def require_simulator(self) -> None:
        """See `Suite.require_simulator`."""
        base.require_package("metaworld", "Meta-World", "metaworld")

    def expert(self, task: str) -> base.Expert:
        """The scripted expert of `task` that comes with Meta-World."""
        base.require_known(self, self.name, [task])
        expert: base.Expert = _simulator().ScriptedExpert(task)
        return expert

    def doctor(self) -> list[Any]:
        """Whether Meta-World is here and can be imported; its MuJoCo is judged with MuJoCo."""
        from perennial.doctor import Check, installed_version, probe

        version = installed_version("metaworld")
        if version is None:
            return [Check("Meta-World", "warning", "not installed", how_to_install("metaworld"))]
        found = probe("import metaworld")
        if not found.succeeded:
            finding = f"{version} cannot be imported: {found.said}"
            return [Check("Meta-World", "problem", finding, how_to_install("metaworld"))]
        return [Check("Meta-World", "ok", version)]


def _simulator() -> Any:
    """The module that imports Meta-World."""
    choose_gl()
    try:
        from perennial.suites._metaworld import simulation as metaworld_simulation
    except ImportError as error:
        raise not_installed("Meta-World", "metaworld", error) from error
    return metaworld_simulation


class MetaWorldEnvironment(base.Environment):
    """One Meta-World task; see `suites.base.Environment`.

    The proprioceptive state is float32 [4]: the hand's x, y, z in metres and the opening of the gripper in [0, 1].
    Actions are float32 [4] in [-1, 1]: the hand's displacement in centimetres and the closing of the gripper; values
    outside are clipped. Without options, `reset(seed=n)` goes to training state n.
    """

    def __init__(self, task: base.Task, variant: str, image_size: int) -> None:
        self.task = task
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self._variant = variant
        self._image_size = image_size
        self._simulation = _simulator().simulation(task.name, variant)
        self._painters: dict[tuple[str, str, int, bool], Painter] = {}
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see `suites.base.Environment`.

        Raises:
            PerennialError: unknown split.
        """
        super().reset(seed=seed)
        split, index = base.initial_state(seed, options)
        self._simulation.begin(split, index)
        self._steps = 0
        return self._state(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step of 12.5 ms; the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite.
        """
        base.require_finite(action)
        success = self._simulation.advance(np.clip(action, -1, 1))
        self._steps += 1
        truncated = not success and self._steps >= self.task.horizon
        return self._state(), float(success), success, truncated, {"is_success": success}

    def _state(self) -> np.ndarray:
        state: np.ndarray = self._simulation.observation[:4].astype(np.float32)
        return state

    def privileged(self) -> np.ndarray:
        """Meta-World's own observation, float64 [39], with the places of objects and goal; for experts only."""
        observation: np.ndarray = self._simulation.observation
        return observation

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The picture that policies see, uint8 [1, image_size, image_size, 3]."""
        return self._paint(self._image_size, fast=True)[None]

    def film(self, size: int) -> np.ndarray:
        """The whole scene with the arm, smooth and with shadows, uint8 [size, size, 3]."""
        return self._paint(size, fast=False)

    def _paint(self, size: int, *, fast: bool) -> np.ndarray:
        key = (self.task.name, self._variant, size, fast)
        if key not in self._painters:
            self._painters[key] = borrow(key, lambda: Painter(self._simulation.model, CAMERA, size, fast=fast))
        picture = self._painters[key].paint(self._simulation.data)
        return np.ascontiguousarray(picture[::-1, ::-1])  # the camera hangs upside down

    def close(self) -> None:
        """Give the renderers back; each is freed with the last environment that uses it."""
        while self._painters:
            give_back(self._painters.popitem()[0])
