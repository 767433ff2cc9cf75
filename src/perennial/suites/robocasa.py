"""RoboCasa: eighteen single skills of a Panda arm on wheels, in kitchens that differ with every initial state.

Nasiriany et al. 2024 (arXiv 2406.02523), release 1.0.1 with its `RoboCasaGymEnv`. Written against that interface and
tested with an imitation of it: not run by us, since RoboCasa is installed from its repository and its assets are 10 GB.

Only tasks whose sentence is the same in every kitchen are here, because a task of a suite has one. Initial state n of a
split is what `reset(seed=...)` makes of a number that no other has. Variant "id" draws from RoboCasa's kitchens and
objects for pre-training, "target" from those that it keeps for evaluation. RoboCasa draws its cameras at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from packaging.version import Version

from perennial.errors import PerennialError
from perennial.suites import base
from perennial.suites._mujoco import choose_gl

# name: (what RoboCasa tells the robot, horizon in its registry of data sets)
_TASKS = {
    "TurnOnMicrowave": ("Press the start button on the microwave.", 450),
    "TurnOnSinkFaucet": ("Turn on the sink faucet.", 600),
    "CloseToasterOvenDoor": ("Close the toaster oven door.", 450),
    "OpenStandMixerHead": ("Open the stand mixer head.", 450),
    "TurnOnElectricKettle": ("Press down the lever to turn on the electric kettle.", 450),
    "TurnOffMicrowave": ("Press the stop button on the microwave.", 300),
    "TurnOffSinkFaucet": ("Turn off the sink faucet.", 300),
    "OpenToasterOvenDoor": ("Open the toaster oven door.", 450),
    "CloseStandMixerHead": ("Close the stand mixer head.", 450),
    "CloseElectricKettleLid": ("Close the lid of the electric kettle.", 300),
    "OpenElectricKettleLid": ("Press the button to open the lid of the electric kettle.", 300),
    "OpenFridgeDrawer": ("Fully open the fridge drawer.", 450),
    "CloseFridgeDrawer": ("Fully close the fridge drawer.", 450),
    "PreheatOven": ("Preheat the oven by turning the temperature knob.", 450),
    "StartCoffeeMachine": ("Press the button on the coffee machine to serve coffee.", 300),
    "TurnOnBlender": ("Turn on the blender by pressing the power button.", 300),
    "TurnOnToaster": ("Push down the lever of the toaster to turn it on.", 300),
    "TurnOnToasterOven": ("Turn on the toaster oven by setting the timer.", 450),
}
_KITCHENS = {"id": "pretrain", "target": "target"}
"""What RoboCasa calls the kitchens of a variant."""
CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
STATE = {
    "state.base_position": 3,
    "state.base_rotation": 4,
    "state.end_effector_position_relative": 3,
    "state.end_effector_rotation_relative": 4,
    "state.gripper_qpos": 2,
}
"""Observed numbers and how many of each, in the order of the proprioceptive state."""
ACTION = {
    "action.end_effector_position": 3,
    "action.end_effector_rotation": 3,
    "action.gripper_close": 1,
    "action.base_motion": 4,
    "action.control_mode": 1,
}
"""Parts of an action and their lengths, in RoboCasa's order."""
_DOWNLOADED = ("textures", "generative_textures", "fixtures/windows", "objects/objaverse", "objects/lightwheel")
"""Folders of assets that do not come with RoboCasa's repository; of missing objects it draws others without a word."""
_OWN_ENVIRONMENT = "it needs an environment of its own, made by the commands in docs/suites.md"


def _task(name: str, told: str, horizon: int) -> base.Task:
    """Evaluation hears RoboCasa's sentence, training the same without its full stop and politely."""
    plain = told[0].lower() + told[1:].rstrip(".")
    return base.Task(name, (plain, f"please {plain}"), told, horizon)


class RoboCasa(base.Suite):
    """Tasks of RoboCasa that press, turn, open and close."""

    name: ClassVar[str] = "robocasa"
    tasks: Mapping[str, base.Task] = {name: _task(name, *of) for name, of in _TASKS.items()}
    sequences: Mapping[str, base.Sequence] = {
        "simple_recipe": base.Sequence(trained=tuple(_TASKS)[:5], held_out=tuple(_TASKS)[5:10])
    }
    variants = tuple(_KITCHENS)
    state_dim = sum(STATE.values())
    action_dim = sum(ACTION.values())

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> RoboCasaEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        base.require_known(self, self.name, [task], [variant])
        wrapper = _wrapper()
        require_assets()
        sizes = {"camera_widths": image_size, "camera_heights": image_size}
        with _explained():
            kitchen = wrapper(env_name=task, split=_KITCHENS[variant], **sizes)
        return RoboCasaEnvironment(self.tasks[task], kitchen)

    def require_simulator(self) -> None:
        """RoboCasa and its assets are here; see `Suite.require_simulator`."""
        require_assets()

    def doctor(self) -> list[Any]:
        """Whether RoboCasa, its robosuite and its assets are here."""
        from perennial.doctor import Check, installed_version

        version, robosuite = installed_version("robocasa"), installed_version("robosuite")
        if version is None:
            return [Check("RoboCasa", "warning", "not installed", _OWN_ENVIRONMENT)]
        if robosuite is None or Version(robosuite) < Version("1.5"):
            finding = f"{version} with robosuite {robosuite}, but it needs 1.5"
            return [Check("RoboCasa", "problem", finding, _OWN_ENVIRONMENT)]
        try:
            require_assets()
        except PerennialError as error:
            return [Check("RoboCasa", "warning", f"{version} without its assets", str(error))]
        return [Check("RoboCasa", "ok", version)]


def _wrapper() -> Any:
    """RoboCasa's gymnasium environment class."""
    choose_gl()
    try:
        from robocasa.wrappers.gym_wrapper import RoboCasaGymEnv
    except ImportError as error:
        raise PerennialError(f"RoboCasa cannot be imported ({error}); {_OWN_ENVIRONMENT}.") from error
    return RoboCasaGymEnv


def _assets() -> Path:
    """The folder of RoboCasa's assets, found without importing it; see `base.package_folder`."""
    return base.package_folder("robocasa", "RoboCasa", _OWN_ENVIRONMENT) / "models" / "assets"


def require_assets() -> None:
    """See that everything that RoboCasa's download brings is here.

    Raises:
        PerennialError: a folder is missing, or RoboCasa itself.
    """
    for folder in (_assets() / name for name in _DOWNLOADED):
        if not folder.is_dir():
            raise _no_kitchen(f"there is no {folder}")


def _no_kitchen(reason: object) -> PerennialError:
    return PerennialError(
        f"RoboCasa cannot build a kitchen ({reason}); fetch its assets, about 10 GB, by `python -m "
        "robocasa.scripts.download_kitchen_assets` in RoboCasa's environment."
    )


@contextmanager
def _explained() -> Iterator[None]:
    """RoboCasa's own errors about files become a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise _no_kitchen(error) from error


class RoboCasaEnvironment(base.Environment):
    """One RoboCasa task; see `suites.base.Environment`.

    The proprioceptive state is float32 [16]: the base's position in metres and quaternion, the hand's position and
    quaternion relative to the base, and both fingers. Actions are float32 [12] in [-1, 1]: the hand's displacement and
    rotation, the gripper (closed from 0.5 on), the base's three motions and the torso's, and what moves (the base
    from 0.5 on, else the arm); values outside are clipped. Without options, `reset(seed=n)` goes to training state n.
    """

    def __init__(self, task: base.Task, kitchen: Any) -> None:
        self.task = task
        self.action_space = gymnasium.spaces.Box(-1, 1, (RoboCasa.action_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (RoboCasa.state_dim,), np.float32)
        self._kitchen = kitchen
        self._observed: Mapping[str, Any] = {}
        self._steps = 0
        self._open = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see `suites.base.Environment`.

        Raises:
            PerennialError: unknown split, a file is missing, or RoboCasa tells the robot something else than this
                suite does.
        """
        super().reset(seed=seed)
        number = base.state_number(*base.initial_state(seed, options))
        with _explained():
            self._observed, _ = self._kitchen.reset(seed=number)
        told = self._observed["annotation.human.task_description"]
        if told != self.task.evaluation_instruction:
            raise PerennialError(
                f"RoboCasa says {told!r} for {self.task.name}, but this suite {self.task.evaluation_instruction!r}; "
                "install RoboCasa 1.0.1."
            )
        self._steps = 0
        return self._state(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step of 50 ms; the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite.
        """
        base.require_finite(action)
        parts = np.split(np.clip(action, -1, 1).astype(np.float64), np.cumsum([*ACTION.values()])[:-1])
        self._observed, *_, info = self._kitchen.step(dict(zip(ACTION, parts, strict=True)))
        self._steps += 1
        success = bool(info["success"])
        truncated = not success and self._steps >= self.task.horizon
        return self._state(), float(success), success, truncated, {"is_success": success}

    def _state(self) -> np.ndarray:
        return np.concatenate([self._observed[part] for part in STATE]).astype(np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The pictures of the last observation, uint8 [3, image_size, image_size, 3]: left, right, hand."""
        return np.stack([self._observed[f"video.{camera}"] for camera in CAMERAS])

    def film(self, size: int) -> np.ndarray:
        """The left camera's view, uint8 [size, size, 3]."""
        upside_down = self._kitchen.env.sim.render(camera_name=CAMERAS[0], width=size, height=size)
        return np.ascontiguousarray(upside_down[::-1])

    def close(self) -> None:
        """End the simulation."""
        if self._open:
            self._kitchen.close()
        self._open = False
