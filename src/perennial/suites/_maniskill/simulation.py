"""ManiSkill's simulations, one robot at a time. Imported only when an environment is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import mani_skill.envs  # registers the tasks
import numpy as np
from mani_skill.sensors.camera import Camera, CameraConfig
from mani_skill.utils.structs.pose import Pose

from perennial.suites._maniskill import plate_scene
from perennial.suites._maniskill.install import no_vulkan, renderer

mani_skill.logger.setLevel("ERROR")

CONTROL = "pd_ee_delta_pose"


def table_top(task: str) -> Simulation:
    """One of ManiSkill's own tasks, by its name without version."""
    return Simulation(lambda **options: gymnasium.make(f"{task}-v1", control_mode=CONTROL, **options).unwrapped)


def put_on_plate(thing: str, variant: str) -> PlateSimulation:
    """The task to put `thing` on the plate."""
    ours = {"control_mode": plate_scene.CONTROL, "sensor_configs": {"shader_pack": "default"}}
    return PlateSimulation(lambda **options: plate_scene.PutOnPlate(thing, variant, **ours, **options))


class Simulation:
    """One task of ManiSkill on the processor, with exact resets; its renderer is made with the first picture.

    Attributes:
        env: ManiSkill's environment.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        try:
            self.env = make(
                num_envs=1, obs_mode="none", reward_mode="none", sim_backend="cpu", render_backend=renderer()
            )
        except RuntimeError as error:  # SAPIEN's word for every trouble with Vulkan
            raise no_vulkan(error) from error
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
    def hand(self) -> Pose:
        """Where the middle between the fingers is, in the world."""
        return self.env.agent.tcp_pose

    @property
    def state(self) -> np.ndarray:
        """What a policy feels, float32 [8]; see `ManiSkillEnvironment`."""
        pose = self.hand.raw_pose[0].numpy()
        fingers = self.env.agent.robot.get_qpos()[0, -2:].sum().item()
        turn = pose[3:] if pose[4] >= 0 else -pose[3:]
        return np.concatenate((pose[:3], turn, [fingers])).astype(np.float32)

    def look(self, size: int) -> np.ndarray:
        """What a policy sees, uint8 [size, size, 3]."""
        return self._take("base_camera", size)["rgb"]

    def film(self, size: int) -> np.ndarray:
        """The scene for people, uint8 [size, size, 3]."""
        return self._take("render_camera", size)["rgb"]

    def _take(self, name: str, size: int, segmentation: bool = False) -> dict[str, np.ndarray]:
        """Arrays [size, size, C] of the camera called `name`."""
        if self._scene is not self.env.scene:  # some tasks build a new one at each reset
            self._scene, self._cameras = self.env.scene, {}
        if (name, size) not in self._cameras:
            known = self.env._sensor_configs | self.env._human_render_camera_configs
            self._cameras[name, size] = Camera(_square(known[name], size), self.env.scene, self.env.agent.robot)
        camera = self._cameras[name, size]
        self.env.scene.update_render()
        camera.capture()
        seen = camera.get_obs(depth=False, position=False, segmentation=segmentation)
        return {kind: picture[0].numpy().copy() for kind, picture in seen.items()}

    def close(self) -> None:
        """Free the scene and its cameras."""
        self._cameras, self._scene = {}, None
        self.env.close()


class PlateSimulation(Simulation):
    """A task on the plate: another robot, and a photograph where the simulated table would be seen."""

    @property
    def hand(self) -> Pose:
        """Where the gripper is, in the world."""
        return self.env.agent.robot.links_map["ee_gripper_link"].pose

    def advance(self, action: np.ndarray) -> bool:
        """One control step; the gripper opens above 0.5, as BridgeData tells it."""
        return super().advance(np.append(action[:6], np.float32(1 if action[6] > 0.5 else -1)))

    def look(self, size: int) -> np.ndarray:
        """Arm, thing and plate before the photograph; the view of 640 x 480 pixels is squeezed into a square."""
        seen = self._take(plate_scene.CAMERA, size, segmentation=True)
        drawn = np.isin(seen["segmentation"], self.env.seen_ids())
        return np.where(drawn, seen["rgb"], plate_scene.photograph(self.env.background, size))

    def film(self, size: int) -> np.ndarray:
        """What policies see."""
        return self.look(size)


def _square(config: CameraConfig, size: int) -> CameraConfig:
    """The same view in a square picture."""
    squeezed = config.intrinsic
    if squeezed is not None:
        squeezed = np.diag([size / config.width, size / config.height, 1]) @ squeezed
    return dataclasses.replace(config, width=size, height=size, intrinsic=squeezed)
