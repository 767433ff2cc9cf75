"""The scene of the tasks "put ... on plate" for ManiSkill. Imported only when an environment is built.

Written after RL4VLA's PutOnPlateInScene25 (see `on_plate`), for ManiSkill 3.0.1, one robot at a time on the processor.
Differs from their code: only the thing of the task is in the scene, not 24 others out of sight; the table is a box, for
the photograph hides theirs in every picture; and pictures are drawn in the size that is asked for, not shrunk from
640 x 480.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import WidowX250SBridgeDatasetFlatTable
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from PIL import Image

from perennial.suites._maniskill import on_plate
from perennial.suites._maniskill.experts import place, spin

CAMERA = "3rd_view_camera"
CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"

_DROP = 0.95
"""Height in metres from which thing and plate fall onto the table."""
_FRICTION = 1.0
_QPOS = np.array([-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037])
_BASE = sapien.Pose([0.147, 0.028, 0.870], [0, 0, 0, 1])
_AWAY = sapien.Pose([0.147, 0.028, 1.870], [0, 0, 0, 1])
_SETTLING = 50, 600
"""Steps of the physics: always, and more if something still moves."""


class PutOnPlate(BaseEnv):  # type: ignore[misc]
    """A WidowX arm, a plate and one thing on a table.

    Attributes:
        thing, plate: the actors.
        background: photograph of the table, of 640 x 480 pixels; from the first reset on.
    """

    background: Image.Image

    SUPPORTED_OBS_MODES = ("none",)
    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(self, name: str, variant: str, **options: Any) -> None:
        self._variant = variant
        self._models = on_plate.thing(name), on_plate.plate()
        files = on_plate.tables()
        self._photographs = {table: Image.open(files[table]).convert("RGB") for table in on_plate.TABLES[variant]}
        super().__init__(robot_uids=WidowX250SBridgeDatasetFlatTable, **options)

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    def _load_agent(self, options: dict[str, Any]) -> None:
        super()._load_agent(options, sapien.Pose([0.127, 0.060, 0.85], [0, 0, 0, 1]))

    def _load_scene(self, options: dict[str, Any]) -> None:
        sapien_utils.set_articulation_render_material(self.agent.robot._objs[0], specular=0.9, roughness=0.3)
        table = self.scene.create_actor_builder()
        table.add_box_collision(half_size=[1, 1, 0.05])
        table.initial_pose = sapien.Pose([0, 0, on_plate.TABLE_TOP - 0.05])
        table.build_static(name="table")
        self.thing, self.plate = (self._build(model) for model in self._models)

    def _build(self, model: on_plate.Model) -> Any:
        builder = self.scene.create_actor_builder()
        material = sapien.physx.PhysxMaterial(_FRICTION, _FRICTION, restitution=0.0)
        builder.add_multiple_convex_collisions_from_file(
            str(model.collision), scale=[1, 1, 1], material=material, density=model.density
        )
        builder.add_visual_from_file(str(model.visual))
        builder.initial_pose = sapien.Pose([1, 0, 1])
        return builder.build(name=model.folder.name)

    def _load_lighting(self, options: dict[str, Any]) -> None:
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        self.scene.add_directional_light([0, 0, -1], [2.2, 2.2, 2.2])
        self.scene.add_directional_light([-1, -0.5, -1], [0.7, 0.7, 0.7])
        self.scene.add_directional_light([1, 1, -1], [0.7, 0.7, 0.7])

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict[str, Any]) -> None:
        """Let thing and plate come to rest while the arm is out of the way."""
        layout = on_plate.layout(self._variant, int(self._episode_seed[0]))
        self.background = self._photographs[layout.table]
        self.agent.robot.set_pose(_AWAY)
        turn = [np.cos(layout.yaw / 2), 0, 0, np.sin(layout.yaw / 2)]
        self.thing.set_pose(sapien.Pose([*layout.thing, _DROP], turn))
        self.plate.set_pose(sapien.Pose([*layout.plate, _DROP], [1, 0, 0, 0]))
        self._advance(_SETTLING[0])
        actors = self.thing, self.plate
        if (
            _speed(actor.linear_velocity for actor in actors) > 1e-3
            or _speed(a.angular_velocity for a in actors) > 1e-2
        ):
            self._advance(_SETTLING[1])
        self.agent.robot.set_pose(_BASE)
        self.agent.reset(init_qpos=_QPOS)
        pairs = zip(actors, self._models, strict=True)
        self._half = [_extent(actor.pose, model.extent) / 2 for actor, model in pairs]

    def _advance(self, steps: int) -> None:
        for _ in range(steps):
            self.scene.step()

    def evaluate(self) -> dict[str, torch.Tensor]:
        """Whether the thing lies on the plate."""
        offset = (self.thing.pose.p - self.plate.pose.p)[0].numpy()
        force = self.scene.get_pairwise_contact_forces(self.thing, self.plate).norm().item()
        thing, plate = self._half
        return {"success": torch.tensor([on_plate.lies(offset, thing, plate, force)])}

    @property
    def thing_extent(self) -> np.ndarray:
        """Size of the thing's bounding box along its own axes, in metres, float64 [3]."""
        return self._models[0].extent

    def thing_centre(self) -> np.ndarray:
        """Middle of the thing's bounding box in the world, in metres, float64 [3]."""
        pose = self.thing.pose
        middle: np.ndarray = spin(pose).apply(self._models[0].centre) + place(pose)
        return middle

    def seen_ids(self) -> np.ndarray:
        """Numbers of arm, thing and plate in a segmentation; all else is covered by the photograph."""
        links = [link._objs[0].entity.per_scene_id for link in self.agent.robot.get_links()]
        return np.array(links + [actor._objs[0].per_scene_id for actor in (self.thing, self.plate)])


def _speed(velocities: Any) -> float:
    return sum(float(velocity.norm()) for velocity in velocities)


def _extent(pose: Pose, extent: np.ndarray) -> np.ndarray:
    """Size along the axes of the world of a box that is turned as `pose`."""
    size: np.ndarray = np.abs(spin(pose).as_matrix()) @ extent
    return size


def photograph(background: Image.Image, size: int) -> np.ndarray:
    """The photograph squeezed into uint8 [size, size, 3]."""
    return np.asarray(background.resize((size, size), Image.Resampling.BOX))
