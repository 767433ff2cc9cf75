"""Franka Kitchen: nine skills of one simulated Panda arm in a kitchen, moved joint by joint.

Gupta et al. 2019 (arXiv 1910.11956) through `gymnasium-robotics`. Its seven goals are a task each; two more repaint the
sliding door, as iRe-VLA does (arXiv 2501.16664). The kitchen there always starts in the same state. Here the arm, the
robot's base and the kettle start where a number says; scaled to the cube [-1, 1], variant "id" lies within 0.8 of the
centre by the largest coordinate, "ood_val" between 0.8 and 0.9, "ood_test" between 0.9 and 1. The shifted variants also
move the camera and change the light.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from perennial.errors import how_to_install, not_installed
from perennial.suites import base
from perennial.suites._kitchen.tasks import SEQUENCES, TASKS, VARIANTS
from perennial.suites._mujoco import Painter, borrow, choose_gl, give_back


class Kitchen(base.Suite):
    """The tasks of Franka Kitchen."""

    name: ClassVar[str] = "kitchen"
    tasks: Mapping[str, base.Task] = TASKS
    sequences: Mapping[str, base.Sequence] = SEQUENCES
    variants = tuple(VARIANTS)
    state_dim = 9
    steps_per_second = 480.0
    action_dim = 9

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> KitchenEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        base.require_known(self, self.name, [task], [variant])
        return KitchenEnvironment(self.tasks[task], variant, image_size)

    def require_simulator(self) -> None:
        """See `Suite.require_simulator`."""
        base.require_package("gymnasium_robotics", "Franka Kitchen", "kitchen")

    def expert(self, task: str) -> base.Expert:
        """The scripted expert of `task`."""
        base.require_known(self, self.name, [task])
        _simulator()
        from perennial.suites._kitchen.expert import ScriptedExpert

        return ScriptedExpert(task)

    def doctor(self) -> list[Any]:
        """Whether gymnasium-robotics is here; its MuJoCo is judged with MuJoCo."""
        from perennial.doctor import Check, installed_version

        version = installed_version("gymnasium-robotics")
        if version is None:
            return [Check("Franka Kitchen", "warning", "not installed", how_to_install("kitchen"))]
        return [Check("Franka Kitchen", "ok", version)]


def _simulator() -> Any:
    """The module that imports gymnasium-robotics."""
    choose_gl()
    try:
        from perennial.suites._kitchen import simulation as kitchen_simulation
    except ImportError as error:
        raise not_installed("Franka Kitchen", "kitchen", error) from error
    return kitchen_simulation


class KitchenEnvironment(base.Environment):
    """One Franka Kitchen task; see `suites.base.Environment`.

    The proprioceptive state is float32 [9]: the angles of the arm's seven joints in radians and the places of both
    fingers in metres. Actions are float32 [9] in [-1, 1]: velocities of the same joints, where 1 is 2 radians or metres
    a second; values outside are clipped. Without options, `reset(seed=n)` goes to training state n.
    """

    def __init__(self, task: base.Task, variant: str, image_size: int) -> None:
        self.task = task
        self.action_space = gymnasium.spaces.Box(-1, 1, (9,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (9,), np.float32)
        self.simulation = _simulator().Simulation(task.name, variant)
        self._camera: str = _simulator().CAMERA
        self._variant = variant
        self._image_size = image_size
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
        self.simulation.begin(split, index)
        self._steps = 0
        return self._state(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step of 80 ms; the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite.
        """
        base.require_finite(action)
        success = self.simulation.advance(np.clip(action, -1, 1).astype(np.float64))
        self._steps += 1
        truncated = not success and self._steps >= self.task.horizon
        return self._state(), float(success), success, truncated, {"is_success": success}

    def _state(self) -> np.ndarray:
        state: np.ndarray = self.simulation.data.qpos[:9].astype(np.float32)
        return state

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The picture that policies see, uint8 [1, image_size, image_size, 3]."""
        return self._paint(self._image_size, fast=True)[None]

    def film(self, size: int) -> np.ndarray:
        """The kitchen with the arm's true surfaces, smooth and with shadows, uint8 [size, size, 3]."""
        return self._paint(size, fast=False)

    def _paint(self, size: int, *, fast: bool) -> np.ndarray:
        key = (self.task.name, self._variant, size, fast)
        if key not in self._painters:
            model = self.simulation.model if fast else self.simulation.film_model()
            self._painters[key] = borrow(("kitchen", *key), lambda: Painter(model, self._camera, size, fast=fast))
        return self._painters[key].paint(self.simulation.data).copy()

    def close(self) -> None:
        """Give the renderers back; each is freed with the last environment that uses it."""
        while self._painters:
            give_back(("kitchen", *self._painters.popitem()[0]))
