"""LIBERO's simulator against LIBERO's own environment, and its scenes that are dropped and built again."""

import gc
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from libero_assets import NAMED, WITH_ASSETS, libero, needs_libero, unpacked  # noqa: F401

from perennial.errors import PerennialError
from perennial.suites._libero import variants as libero_variants
from perennial.suites._libero.tasks import location
from perennial.suites.libero import Libero
from perennial.suites.libero_retain import LiberoRetain
from perennial.suites.libero_study import LiberoStudy
from perennial.suites.libero_wrist import LiberoWrist

pytestmark = needs_libero

SUITE = Libero()
GOLDEN = Path(__file__).parents[1] / "golden" / "libero.npz"
REST = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


def theirs(task, index, size=None):
    """LIBERO's own environment after its own reset and ten steps at rest, and what it observed."""
    from libero.libero.envs.env_wrapper import ControlEnv

    from perennial.suites._libero.simulation import FOLDER, stored_states

    folder, file = location(task)
    drawing = {"camera_heights": size, "camera_widths": size} if size else {"use_camera_obs": False}
    environment = ControlEnv(
        bddl_file_name=str(FOLDER / "bddl_files" / folder / f"{file}.bddl"),
        has_offscreen_renderer=size is not None,
        **drawing,
    )
    environment.seed(0)
    environment.reset()
    environment.set_init_state(stored_states(task)[index])
    for _ in range(10):
        observed, *_ = environment.step(REST)
    return environment, observed


def moves(count):
    """Random actions; every second one does not turn the hand, so the controller keeps its goal of orientation."""
    actions = np.random.default_rng(0).uniform(-1, 1, (count, 7)).astype(np.float32)
    actions[::2, 3:6] = 0
    return actions


@pytest.mark.parametrize("task", ["object-5", "long-2", "90-75"])
def test_episodes_are_those_of_libero_bit_for_bit(libero, task):  # noqa: F811
    """Physics and state, after other episodes and from a remembered beginning."""
    environment = SUITE.make(task)  # chooses how to draw, before anything imports MuJoCo
    from robosuite.utils.transform_utils import quat2axisangle

    start(environment, 1)
    environment.step(moves(1)[0])
    for index in (3, 1, 3):
        start(environment, index)
    reference, observed = theirs(task, 3)
    for action in moves(5):
        turn = quat2axisangle(observed["robot0_eef_quat"])
        state = np.concatenate((observed["robot0_eef_pos"], turn, observed["robot0_gripper_qpos"]))
        np.testing.assert_array_equal(environment.simulation.state, state)
        np.testing.assert_array_equal(environment.simulation._data.qpos, reference.sim.data._data.qpos)
        observed, *_ = reference.step(action.astype(np.float64))
        environment.step(action)
    environment.close()


def test_drawn_beginnings_are_those_of_liberos_reset(libero):  # noqa: F811
    """Also where furniture that a reset moves carries things, after another beginning was drawn."""
    SUITE.make("spatial-9").close()
    from perennial.suites._libero.simulation import Scene

    scene = Scene(("spatial-9", "id", "", 0))
    reference, _ = theirs("spatial-9", 0)
    for seed in (5, 6):
        reference.seed(seed)
        reference.env.reset()
        scene.draw(seed)
        np.testing.assert_array_equal(scene.sim.data._data.qpos, reference.sim.data._data.qpos)
        np.testing.assert_array_equal(scene.model.body_pos, reference.sim.model._model.body_pos)


def test_pictures_are_those_of_libero_pixel_for_pixel(libero):  # noqa: F811
    """Both cameras; LIBERO draws one physics step before a control step ends, and so rotates as OpenVLA does."""
    environment = LiberoWrist().make("spatial-5", image_size=64)
    start(environment, 3)
    reference, observed = theirs("spatial-5", 3, 64)
    for action in moves(3):
        pictures = [observed[f"{camera}_image"][::-1, ::-1] for camera in ("agentview", "robot0_eye_in_hand")]
        np.testing.assert_array_equal(environment.render(), pictures)
        observed, *_ = reference.step(action.astype(np.float64))
        environment.step(action)
    environment.close()


@pytest.mark.skipif(bool(NAMED), reason="golden frames belong to the shared assets, and others are named")
@pytest.mark.parametrize("task", ["spatial-0", "object-0", "goal-0", "long-4", "90-75"])
def test_first_frames_are_golden(libero, task):  # noqa: F811
    """The first evaluation state of a task of each suite, within what two OpenGL libraries may differ by."""
    environment = LiberoWrist().make(task, image_size=32)
    start(environment, 0, "evaluation")
    seen = environment.render().astype(int)
    environment.close()
    with np.load(GOLDEN) as golden:
        assert np.abs(seen - golden[task]).mean() < 2
        assert abs(seen.mean() - golden[task].mean()) < 1, "darker or brighter"


def test_the_camera_of_the_study_is_where_its_code_puts_it(libero):  # noqa: F811
    """Pixel for pixel what LIBERO's environment shows once its camera is moved."""
    environment = LiberoStudy().make("spatial-6", "cam2", image_size=64)
    start(environment, 3)
    reference, _ = theirs("spatial-6", 3, 64)
    model = reference.sim.model
    model.cam_pos[model.camera_name2id("agentview")] = [0.6986, 0.0, 1.5904]
    model.cam_quat[model.camera_name2id("agentview")] = [0.639, 0.304, 0.304, 0.639]
    for action in moves(2):
        observed, *_ = reference.step(action.astype(np.float64))
        environment.step(action)
    np.testing.assert_array_equal(environment.render()[0], observed["agentview_image"][::-1, ::-1])
    environment.close()


def test_retain_moves_things_and_adds_others(libero, monkeypatch):  # noqa: F811
    """Distractors stand on the table of long-7 in another room, the same ones for ten episodes."""
    monkeypatch.setattr(libero_variants, "_DISTRACTORS", WITH_ASSETS)
    environment = LiberoRetain().make("long-7", "hard-1", image_size=32)
    found = []
    for index in (0, 9, 10):
        start(environment, index, "evaluation")
        env = environment.simulation.present().env
        things = set(env.objects_dict)
        found.append(things - {"alphabet_soup_1", "cream_cheese_1", "tomato_sauce_1", "ketchup_1", "basket_1"})
        assert "kitchen" in env._arena_type
    environment.close()
    assert [len(names) for names in found] == [3, 3, 3]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("stable_hope_objects/milk/milk.xml", None),
        ("stable_hope_objects/milk/visual/textured_vis.msh", None),
        ("stable_hope_objects/milk/visual/textured_vis.msh", b"cut off"),
        ("stable_hope_objects/milk/milk.xml", b"<mujoco>"),
    ],
)
def test_a_missing_or_damaged_file_of_the_assets_is_named(libero, unpacked, tmp_path, monkeypatch, file, content):  # noqa: F811
    """Where a scene is built from an incomplete copy of the assets."""
    assets = shutil.copytree(unpacked, tmp_path / "assets", copy_function=os.symlink)
    (assets / file).unlink()
    if content is not None:
        (assets / file).write_bytes(content)
    monkeypatch.setenv("PERENNIAL_LIBERO_ASSETS", str(assets))
    environment = SUITE.make("object-7")
    from perennial.suites._libero import simulation as libero_simulation

    monkeypatch.setattr(libero_simulation, "_scenes", {})
    with pytest.raises(PerennialError, match=r"PERENNIAL_LIBERO_ASSETS") as raised:
        start(environment)
    said = str(raised.value)
    assert str(assets) in said
    assert Path(file).name in said or content == b"<mujoco>"
    assert "hf download" in said


@pytest.fixture
def simulation(libero, monkeypatch):  # noqa: F811
    """The module of the simulation, with room for one scene and nothing remembered."""
    Libero().make("object-5").close()  # chooses how to draw, before anything imports MuJoCo
    from perennial.suites._libero import simulation as libero_simulation

    monkeypatch.setattr(libero_simulation, "_SCENES", 1)
    monkeypatch.setattr(libero_simulation, "_scenes", {})
    monkeypatch.setattr(libero_simulation, "_settled", {})
    return libero_simulation


def episode(environment, steps=5):
    """The simulator's positions after a reset and after each of `steps` random actions; the episode does not end."""
    environment.reset(options={"split": "training", "index": 3})
    seen = [environment.simulation._data.qpos.copy()]
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, 7)).astype(np.float32):
        environment.step(action)
        seen.append(environment.simulation._data.qpos.copy())
    environment.simulation.end()
    return seen


def test_an_episode_is_the_same_in_a_scene_that_was_built_again(simulation):
    """From a remembered beginning, whose controller looked at the simulation that has been dropped."""
    first, second = (Libero().make(task) for task in ("object-5", "object-0"))
    fresh = episode(first)
    dropped = simulation._scenes["object-5", "id", "", 0]
    episode(second)
    np.testing.assert_array_equal(episode(first), fresh)
    assert first.simulation.present() is not dropped
    for environment in (first, second):
        environment.close()


def test_what_is_remembered_of_a_dropped_scene_keeps_no_simulation_alive(simulation):
    """Neither the remembered beginnings nor an environment that has not been closed hold on to it."""
    first, second = (Libero().make(task) for task in ("object-5", "object-0"))
    episode(first)
    gone = [weakref.ref(simulation._scenes["object-5", "id", "", 0].sim)]
    gone.append(weakref.ref(first.simulation._data))
    episode(second)
    gc.collect()
    assert simulation._settled
    assert [reference() for reference in gone] == [None, None]
    for environment in (first, second):
        environment.close()
