"""An environment in the form of LeRobot's hub, without a simulator: a point is to be lifted to one of two marks.

`make_env` is what LeRobot calls; `--suite envhub:perennial.testing.hub:make_env` uses it unmodified.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

HEIGHTS = {"low": 0.3, "high": 0.7}
NEAR = (0.2, 0.05)
"""How far from the mark the point may be, sideways and in height."""
SPEED = 0.1
STEPS = 20


class Lift(gymnasium.Env[dict[str, Any], np.ndarray]):
    """A point with a place in the cube [-1, 1]^3 and a gripper in [0, 1], seen from the front."""

    _max_episode_steps = STEPS

    def __init__(self, height: str) -> None:
        self.task = height
        self.task_description = f"lift the point to the {height} mark"
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({"front": spaces.Box(0, 255, (48, 64, 3), np.uint8)}),
                "agent_pos": spaces.Box(-1, 1, (4,), np.float64),
            }
        )
        self.action_space = spaces.Box(-1, 1, (4,), np.float32)
        self._state = np.zeros(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin somewhere below the marks."""
        super().reset(seed=seed)
        self._state = np.append(self.np_random.uniform((-0.5, -0.5, -0.4), (0.5, 0.5, 0)), 0.5)
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move by up to `SPEED` along each axis."""
        self._state = np.clip(self._state + SPEED * action, (-1, -1, -1, 0), 1)
        away = np.abs(self._state[[0, 2]] - (0, HEIGHTS[self.task]))
        success = bool((away < NEAR).all())
        return self._observation(), 0.0, success, False, {"is_success": success}

    def _observation(self) -> dict[str, Any]:
        picture = np.full((48, 64, 3), 40, np.uint8)
        picture[round(23.5 - 20 * HEIGHTS[self.task]), 26:37] = (40, 200, 80)
        row, column = int(23 - 20 * self._state[2]), int(31 + 28 * self._state[0])
        picture[row - 2 : row + 3, column - 2 : column + 3] = (255, int(255 * self._state[3]), 255)
        return {"pixels": {"front": picture}, "agent_pos": self._state.copy()}


def make_env(n_envs: int = 1, use_async_envs: bool = False) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
    """`{"lift": {0: low, 1: high}}`, each with `n_envs` copies."""
    kind = gymnasium.vector.AsyncVectorEnv if use_async_envs else gymnasium.vector.SyncVectorEnv
    copies = {height: [lambda height=height: Lift(height)] * n_envs for height in HEIGHTS}
    return {"lift": {number: kind(made) for number, made in enumerate(copies.values())}}
