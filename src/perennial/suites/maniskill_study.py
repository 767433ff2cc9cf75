"""The study of the simple recipe on ManiSkill: a WidowX arm puts eight things on a plate.

arXiv 2603.11653, whose scene, models and photographs are RL4VLA's (arXiv 2505.19789); neither ManiSkill nor Perennial
brings them. Training hears the sentence of evaluation, as in the paper. Which 160 initial states the paper trains on is
not published; a re-implementation that cites its appendix has 40 positions, four turns and one table, so the variant
"id" has one photograph, and "tables" the other fifteen with which RL4VLA trains.

The control step is 0.2 seconds. Physics runs on the processor, one robot for each environment; RL4VLA's runs on a GPU,
with another inverse kinematics. An episode ends with the first success, theirs goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np

from perennial.errors import PerennialError
from perennial.suites import base
from perennial.suites._maniskill import on_plate
from perennial.suites._maniskill.plate_expert import put_on_plate
from perennial.suites.maniskill import ManiSkillEnvironment, simulator

_TAUGHT = ("carrot", "bread", "ketchup bottle", "fast food cup")
_HELD_OUT = ("watering can", "pipe", "toy bear", "hamburger")
_HORIZON = 80


def _name(thing: str) -> str:
    return f"Put{thing.title().replace(' ', '')}OnPlate"


_THINGS = {_name(thing): thing for thing in (*_TAUGHT, *_HELD_OUT)}


def _task(name: str, sentence: str) -> base.Task:
    return base.Task(name, (sentence,), sentence, _HORIZON)


class ManiSkillStudy(base.Suite):
    """The eight tasks "put ... on plate".

    Actions are float32 [7]: displacement of the gripper in metres (at most 0.05 along each axis), its rotation in
    radians as Euler angles XYZ (at most 0.25 each), and whether it opens (above 0.5) or closes, as BridgeData tells it.
    Both are along the axes of the robot's base, which looks against the x axis of the world. Proprioceptive state and
    pictures are those of `ManiSkillEnvironment`; the hand is the link `ee_gripper_link`.
    """

    name: ClassVar[str] = "maniskill_study"
    tasks: Mapping[str, base.Task] = {name: _task(name, f"put {thing} on plate") for name, thing in _THINGS.items()}
    sequences: Mapping[str, base.Sequence] = {
        "simple_recipe": base.Sequence(tuple(map(_name, _TAUGHT)), tuple(map(_name, _HELD_OUT)))
    }
    variants = tuple(on_plate.TABLES)
    shares = frozenset({"sentences"})
    state_dim = 8
    action_dim = 7
    steps_per_second = 100.0

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> ManiSkillEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        base.require_known(self, self.name, [task], [variant])
        self.check(task)
        space = gymnasium.spaces.Box(on_plate.LOW, on_plate.HIGH, dtype=np.float32)
        return ManiSkillEnvironment(
            self.tasks[task], simulator().put_on_plate(_THINGS[task], variant), space, image_size
        )

    def check(self, task: str, variant: str = "id") -> None:
        """The robot, the models and the photographs are here."""
        on_plate.require(_THINGS[task])

    def states(self, task: str, split: base.Split, variant: str = "id") -> int:
        """Combinations of photograph, places and turn that no other split has."""
        return on_plate.states(variant)

    def require_simulator(self) -> None:
        """See `Suite.require_simulator`."""
        base.require_package("mani_skill", "ManiSkill", "maniskill")

    def expert(self, task: str) -> base.Expert:
        """One scripted expert for all."""
        base.require_known(self, self.name, [task])
        return put_on_plate

    def doctor(self) -> list[Any]:
        """Whether robot, models and photographs are here; for the rest see ManiSkill's own."""
        from perennial.doctor import Check, installed_version

        if installed_version("mani_skill") is None:
            return []
        try:
            for thing in _THINGS.values():
                on_plate.require(thing)
        except PerennialError as error:
            return [Check("ManiSkill study", "warning", "files are missing", str(error))]
        return [Check("ManiSkill study", "ok", "robot, models and photographs are here")]
