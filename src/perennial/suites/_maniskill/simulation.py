"""ManiSkill's simulations, one robot at a time. Imported only when an environment is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import mani_skill.envs  # registers the tasks
import numpy as np
from mani_skill.sensors.camera import Camera

from perennial.suites._maniskill.install import no_vulkan, renderer

mani_skill.logger.setLevel("ERROR")

CAMERA, FILM = "base_camera", "render_camera"
CONTROL = "pd_ee_delta_pose"


class Simulation:
    """One task of ManiSkill on the processor, with exact resets; its renderer is made with the first picture.

    Attributes:
        env: ManiSkill's environment.
    """

    def __init__(self, task: str) -> None:
        try:
            made = gymnasium.make(
                f"{task}-v1",
                num_envs=1,
                obs_mode="none",
                reward_mode="none",
                control_mode=CONTROL,
                sim_backend="cpu",
                render_backend=renderer(),
            )
        except RuntimeError as error:  # SAPIEN's word for every trouble with Vulkan
            raise no_vulkan(error) from error
        self.env: Any = made.unwrapped
        self._scene: Any = None
        self._cameras: dict[tuple[str, int], Camera] = {}

    def begin(self, seed: int) -> None:
        """Go to the initial state that ManiSkill draws with `seed`, whatever happened before."""
        self.env.reset(seed=seed)

    def advance(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved now."""
        *_, info = self.env.step(action)
        return bool(info["success"].item())

    @property
    def state(self) -> np.ndarray:
        """What a policy feels, float32 [8]; see `ManiSkillEnvironment`."""
        pose = self.env.agent.tcp_pose.raw_pose[0].numpy()
        fingers = self.env.agent.robot.get_qpos()[0, -2:].sum().item()
        turn = pose[3:] if pose[4] >= 0 else -pose[3:]
        return np.concatenate((pose[:3], turn, [fingers])).astype(np.float32)

    def picture(self, name: str, size: int) -> np.ndarray:
        """What the camera called `name` sees, uint8 [size, size, 3]."""
        if self._scene is not self.env.scene:  # some tasks build a new one at each reset
            self._scene, self._cameras = self.env.scene, {}
        if (name, size) not in self._cameras:
            known = self.env._sensor_configs | self.env._human_render_camera_configs
            config = dataclasses.replace(known[name], width=size, height=size)
            self._cameras[name, size] = Camera(config, self.env.scene)
        camera = self._cameras[name, size]
        self.env.scene.update_render()
        camera.capture()
        seen = camera.get_obs(depth=False, position=False, segmentation=False)["rgb"]
        picture: np.ndarray = seen[0].numpy().copy()
        return picture

    def close(self) -> None:
        """Free the scene and its cameras."""
        self._cameras, self._scene = {}, None
        self.env.close()
