"""The adapter against an imitation of RoboCasa 1.0.1's environment with its signatures, names, shapes and types."""

import sys
import types

import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.suites import robocasa as adapter
from perennial.suites.robocasa import RoboCasa
from perennial.testing.suite_conformance import (
    CHECKS,
    IN_ANOTHER_PROCESS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = RoboCasa()
SENTENCES = {"TurnOnMicrowave": "Press the start button on the microwave.", "PreheatOven": "Something else."}
WANTED = {
    "action.gripper_close": (1,),
    "action.end_effector_position": (3,),
    "action.end_effector_rotation": (3,),
    "action.base_motion": (4,),
    "action.control_mode": (1,),
}
CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")


class Kitchen:
    """The robosuite environment inside: a hand on a line, and a button at 1."""

    def __init__(self):
        self.rng = np.random.default_rng()
        self.sim = self
        self.closed = 0

    def render(self, width=None, height=None, *, camera_name=None, depth=False, mode="offscreen"):
        assert camera_name == "robot0_agentview_left"
        picture = np.zeros((height, width, 3), np.uint8)
        picture[: height // 2] = 255  # the floor: robosuite draws upside down
        return picture

    def close(self):
        self.closed += 1


class RoboCasaGymEnv:
    """What robocasa.wrappers.gym_wrapper offers."""

    def __init__(
        self,
        env_name=None,
        camera_names=None,
        camera_widths=None,
        camera_heights=None,
        enable_render=True,
        split="test",
        **kwargs,
    ):
        assert split in ("pretrain", "target"), "create_env knows no other"
        assert not kwargs
        assert camera_names is None, "the wrapper passes it on twice"
        self.name, self.size, self.split, self.env = env_name, (camera_heights, camera_widths), split, Kitchen()

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.env.rng = np.random.default_rng(seed)
        self.hand, self.layout = 0.0, self.env.rng.uniform(0, 1, 3)
        return self._observation(), {"success": False}

    def step(self, action_dict):
        assert {name: part.shape for name, part in action_dict.items()} == WANTED
        self.last = action_dict
        self.hand += action_dict["action.end_effector_position"][2] / 10
        success = bool(self.hand > 0.95)
        return self._observation(), float(success), False, False, {"success": success}

    def _observation(self):
        base, turned = np.full(3, self.layout[0], np.float32), np.array([0, 0, 0, 1], np.float32)
        hand = np.array([0, 0, self.hand], np.float32)
        brightness = 100 * self.layout + 50 * (self.split == "target") + 5 * self.hand
        return {
            "state.gripper_qpos": np.array([0.04, -0.04], np.float32),
            "state.base_position": base,
            "state.base_rotation": turned,
            "state.end_effector_position_relative": hand,
            "state.end_effector_rotation_relative": -turned,
            **{f"video.{name}": np.full((*self.size, 3), brightness + i, np.uint8) for i, name in enumerate(CAMERAS)},
            "annotation.human.task_description": SENTENCES[self.name],
        }

    def close(self):
        self.env.close()


@pytest.fixture
def assets(monkeypatch, tmp_path):
    """The folder of RoboCasa's assets, in which nothing is missing."""
    for name in adapter._DOWNLOADED:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(adapter, "_assets", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def robocasa(monkeypatch, assets):
    """RoboCasa as far as it is imitated."""
    for name in ("robocasa", "robocasa.wrappers", "robocasa.wrappers.gym_wrapper"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["robocasa.wrappers.gym_wrapper"].RoboCasaGymEnv = RoboCasaGymEnv
    monkeypatch.setenv("MUJOCO_GL", "glfw")


@pytest.mark.usefixtures("robocasa")
@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check not in IN_ANOTHER_PROCESS], ids=lambda check: check.__name__
)
def test_conformance(check):
    check(SUITE, "TurnOnMicrowave")


@pytest.mark.parametrize("task", SUITE.tasks)
def test_sentences_of_every_task(task):
    sentences_of_evaluation_are_never_trained(SUITE, task)
    sequences_name_tasks_once(SUITE, task)


@pytest.mark.usefixtures("robocasa")
def test_state_and_action_are_put_together_in_the_documented_order():
    environment = SUITE.make("TurnOnMicrowave")
    state, _ = environment.reset()
    place = environment._kitchen.layout[0]
    expected = [place, place, place, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, -1, 0.04, -0.04]
    np.testing.assert_allclose(state, expected, rtol=1e-6)
    action = np.linspace(-1, 1, 12).astype(np.float32)
    environment.step(action)
    given = environment._kitchen.last
    order = ("end_effector_position", "end_effector_rotation", "gripper_close", "base_motion", "control_mode")
    np.testing.assert_array_equal(np.concatenate([given[f"action.{part}"] for part in order]), action)


@pytest.mark.usefixtures("robocasa")
def test_success_ends_the_episode():
    environment = SUITE.make("TurnOnMicrowave")
    environment.reset()
    up = np.eye(12, dtype=np.float32)[2]
    outcomes = [environment.step(up)[1:] for _ in range(10)]
    assert outcomes == [(0, False, False, {"is_success": False})] * 9 + [(1, True, False, {"is_success": True})]


@pytest.mark.usefixtures("robocasa")
def test_cameras_come_in_order_and_the_film_is_upright():
    environment = SUITE.make("TurnOnMicrowave", image_size=8)
    environment.reset()
    seen = environment.render().astype(int)
    assert seen.shape == (3, 8, 8, 3)
    assert (np.diff(seen, axis=0) == 1).all()
    film = environment.film(6)
    assert film[:3].max() == 0
    assert film[3:].min() == 255


@pytest.mark.usefixtures("robocasa")
def test_a_release_that_says_something_else_is_refused():
    with pytest.raises(PerennialError, match=r"says 'Something else.' for PreheatOven.*install RoboCasa 1.0.1"):
        SUITE.make("PreheatOven").reset()


@pytest.mark.usefixtures("robocasa")
def test_closing_twice_closes_once():
    environment = SUITE.make("TurnOnMicrowave")
    environment.close()
    environment.close()
    assert environment._kitchen.env.closed == 1


FETCH = r"about 10 GB, by `python -m robocasa\.scripts\.download_kitchen_assets`"


@pytest.mark.usefixtures("robocasa")
@pytest.mark.parametrize("folder", ["textures", "fixtures/windows", "objects/lightwheel"])
def test_a_missing_folder_of_assets_is_named_before_a_run_and_before_anything_is_built(folder, assets):
    """RoboCasa would draw an object from the folders that are here."""
    (assets / folder).rmdir()
    for look in (SUITE.require_simulator, lambda: SUITE.make("TurnOnMicrowave")):
        with pytest.raises(PerennialError, match=f"there is no {assets / folder}.*{FETCH}"):
            look()


@pytest.mark.usefixtures("robocasa")
@pytest.mark.parametrize("error", [FileNotFoundError("no model.xml"), ValueError("Error opening file 'x.png'")])
def test_a_missing_file_of_the_assets_is_named(error, monkeypatch):
    """RoboCasa builds a kitchen when it is constructed and with every reset."""

    def fail(*_, **__):
        raise error

    environment = SUITE.make("TurnOnMicrowave")
    monkeypatch.setattr(RoboCasaGymEnv, "reset", fail)
    monkeypatch.setattr(RoboCasaGymEnv, "__init__", fail)
    for build in (environment.reset, lambda: SUITE.make("TurnOnMicrowave")):
        with pytest.raises(PerennialError, match=f"{error}.*{FETCH}"):
            build()


def test_a_simulator_that_is_not_installed_is_known_without_an_import(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerennialError, match=r"^RoboCasa is not installed; .* of its own, .* docs/suites\.md"):
        SUITE.require_simulator()


def test_a_missing_simulator_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "robocasa", None)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(
        PerennialError, match=r"cannot be imported .*; .* an environment of its own, .* docs/suites\.md"
    ):
        SUITE.make("TurnOnMicrowave")


def test_the_doctor_says_whether_it_is_installed(monkeypatch, assets):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda _: None)
    assert [check.status for check in SUITE.doctor()] == ["warning"]
    versions = {"robocasa": "1.0.1", "robosuite": "1.5.2"}
    monkeypatch.setattr("perennial.doctor.installed_version", versions.get)
    assert [(check.status, check.finding) for check in SUITE.doctor()] == [("ok", "1.0.1")]
    (assets / "textures").rmdir()
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "1.0.1 without its assets")
    assert "download_kitchen_assets" in check.fix
    versions["robosuite"] = "1.4.0"
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("problem", "1.0.1 with robosuite 1.4.0, but it needs 1.5")
    assert "an environment of its own" in check.fix


@pytest.mark.usefixtures("robocasa")
def test_what_cannot_be_done_is_refused():
    with pytest.raises(PerennialError, match="TurnOnMicrowave"):
        SUITE.make("TurnOnMicrowaves")
    with pytest.raises(PerennialError, match="Did you mean target"):
        SUITE.make("TurnOnMicrowave", "targets")
    environment = SUITE.make("TurnOnMicrowave")
    with pytest.raises(PerennialError, match="evaluation"):
        environment.reset(options={"split": "evaluate", "index": 0})
    environment.reset()
    with pytest.raises(PerennialError, match="not finite"):
        environment.step(np.full(12, np.nan))
