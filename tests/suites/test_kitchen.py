import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.suites.kitchen import Kitchen
from perennial.testing.suite_conformance import (
    CHECKS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = Kitchen()
GOLDEN = Path(__file__).parent.parent / "golden" / "kitchen.npz"
INSTALLED = importlib.util.find_spec("gymnasium_robotics") is not None


def simulator(test):
    skip = pytest.mark.skipif(not INSTALLED, reason="gymnasium-robotics is not installed: make setup")
    return pytest.mark.simulator(skip(test))


def simulations():
    """The module that imports the simulator; an environment must have been made, which chooses how MuJoCo draws."""
    from perennial.suites._kitchen import simulation as kitchen_simulation

    return kitchen_simulation


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


def test_reading_the_tasks_imports_no_simulator():
    code = (
        "import sys; from perennial.suites.kitchen import Kitchen; assert len(Kitchen().tasks) == 9; "
        "assert not {'gymnasium_robotics', 'mujoco'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("ask", [SUITE.make, SUITE.expert], ids=["make", "expert"])
def test_a_missing_simulator_is_explained(monkeypatch, ask):
    import perennial.suites._kitchen

    for library in ("gymnasium_robotics", "mujoco"):  # a MuJoCo imported now would keep the variable set below
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "perennial.suites._kitchen.simulation", raising=False)
    monkeypatch.delattr(perennial.suites._kitchen, "simulation", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(PerennialError, match=r"run pip install -c constraints\.txt -e '\.\[kitchen\]' in"):
        ask("kettle")


def test_a_missing_simulator_is_known_without_an_import(monkeypatch):
    if INSTALLED:
        SUITE.require_simulator()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerennialError, match=r"^Franka Kitchen is not installed; run pip install .*\[kitchen\]' in"):
        SUITE.require_simulator()


def test_unknown_names_are_answered_with_the_nearest():
    for ask in (SUITE.make, SUITE.expert):
        with pytest.raises(PerennialError, match="microwave"):
            ask("microwaves")
    with pytest.raises(PerennialError, match="ood_val"):
        SUITE.make("microwave", "ood_vale")


def test_the_doctor_says_whether_it_is_installed(monkeypatch):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda _: None)
    (check,) = SUITE.doctor()
    assert check.status == "warning"
    assert check.fix == "pip install -c constraints.txt -e '.[kitchen]' in the folder of Perennial's source"
    monkeypatch.setattr("perennial.doctor.installed_version", lambda name: {"gymnasium-robotics": "1.4.2"}[name])
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("ok", "1.4.2")


@pytest.mark.parametrize("task", SUITE.tasks)
def test_sentences_of_every_task(task):
    sentences_of_evaluation_are_never_trained(SUITE, task)
    sequences_name_tasks_once(SUITE, task)


def test_every_word_of_evaluation_is_trained_somewhere():
    trained = {word for task in SUITE.tasks.values() for sentence in task.instructions for word in sentence.split()}
    assert not {word for task in SUITE.tasks.values() for word in task.evaluation_instruction.split()} - trained


@simulator
@pytest.mark.parametrize("check", CHECKS[2:], ids=lambda check: check.__name__)
def test_conformance(check):
    check(SUITE, "slide-cabinet-red")


@simulator
@pytest.mark.parametrize("task", SUITE.tasks)
def test_expert_episodes_are_those_of_gymnasium_robotics_bit_for_bit(task):
    """Its own environment without noise, put into our initial state, moves alike and is solved in the same step."""
    element = task.removesuffix("-red").removesuffix("-yellow").replace("-", " ")
    settings = {"object_noise_ratio": 0.0, "robot_noise_ratio": 0.0, "tasks_to_complete": [element]}
    environment, expert = SUITE.make(task), SUITE.expert(task)
    reference = simulations().kitchen_env.KitchenEnv(**settings)
    start(environment, 3)
    ours, theirs = environment.simulation, reference.robot_env
    theirs.init_qpos[:] = ours.data.qpos
    theirs.model.body_pos[:] = ours.model.body_pos
    reference.reset()
    rng = np.random.default_rng(0)
    ended = False
    while not ended:
        np.testing.assert_array_equal(ours.data.qpos, theirs.data.qpos)
        np.testing.assert_array_equal(ours.data.qvel, theirs.data.qvel)
        action = (expert(environment) + rng.normal(0, 0.05, 9)).astype(np.float32)
        state, _, terminated, truncated, info = environment.step(action)
        ended = terminated or truncated
        _, _, _, _, expected = reference.step(action.astype(np.float64))
        assert info["is_success"] == (element in expected["step_task_completions"])
        np.testing.assert_array_equal(state, theirs.data.qpos[:9].astype(np.float32))
    assert info["is_success"]


@simulator
def test_initial_states_lie_in_the_shells_that_the_variants_promise():
    """They fill them too; the robot's base stays at its height, the rest of the kitchen where it is."""
    half = np.array([0.1] * 7 + [0.02] * 4)
    for variant, (inner, outer) in {"id": (0.0, 0.8), "ood_val": (0.8, 0.9), "ood_test": (0.9, 1.0)}.items():
        environment = SUITE.make("kettle", variant)
        robot = simulations().original().robot_env
        simulation, base = environment.simulation, environment.simulation.model.body("panda0_link0").parentid[0]
        distances = []
        for index in range(40):
            start(environment, index)
            moved = simulation.data.qpos - robot.init_qpos
            stand = simulation.model.body_pos[base] - robot.model.body_pos[base]
            point = np.concatenate((moved[:7], stand[:2], moved[23:25])) / half
            distances.append(np.abs(point).max())
            assert stand[2] == 0
            assert not moved[7:23].any()
            assert not moved[25:].any()
        assert inner <= min(distances)
        assert outer - 0.05 < max(distances) <= outer + 1e-9


@simulator
def test_the_sliding_door_has_the_colour_that_its_task_says():
    def share(task, wanted):
        environment = SUITE.make(task)
        start(environment)
        red, green, blue = np.moveaxis(environment.render()[0].astype(int), -1, 0)
        environment.close()
        looks = {"red": (red > 100) & (green < 60) & (blue < 60), "yellow": (red > 100) & (green > 80) & (blue < 60)}
        return looks[wanted][:16, 20:44].mean()

    for colour in ("red", "yellow"):
        assert share(f"slide-cabinet-{colour}", colour) > 0.3
        assert share("slide-cabinet", colour) < 0.02


@simulator
def test_the_film_shows_the_true_arm_in_the_same_place():
    """White links instead of blue hulls, over an otherwise similar picture."""
    environment = SUITE.make("microwave", image_size=64)
    start(environment)
    image, film = environment.render()[0].astype(int), environment.film(64).astype(int)
    environment.close()
    arm = (slice(36, 54), slice(40, 58))
    assert (image[arm][..., 2] - image[arm][..., 0]).mean() > 20
    assert abs((film[arm][..., 2] - film[arm][..., 0]).mean()) < 10
    assert np.abs(film - image).mean() < 40


@simulator
def test_the_first_frame_is_golden():
    """Within what two OpenGL libraries may differ by."""
    environment = SUITE.make("microwave", image_size=32)
    start(environment, 0, "evaluation")
    seen = environment.render().astype(int)
    environment.close()
    with np.load(GOLDEN) as golden:
        assert np.abs(seen - golden["microwave"]).mean() < 2
        assert abs(seen.mean() - golden["microwave"].mean()) < 1, "darker or brighter"


@simulator
def test_what_cannot_be_done_is_refused():
    environment = SUITE.make("kettle")
    with pytest.raises(PerennialError, match="evaluation"):
        start(environment, split="evaluate")
    start(environment)
    with pytest.raises(PerennialError, match="not finite"):
        environment.step(np.full(9, np.nan, np.float32))
