import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from libero_assets import NAMED, libero, needs_libero, unpacked  # noqa: F401

from perennial.errors import PerennialError
from perennial.suites import _libero_install
from perennial.suites._libero_tasks import FILES, FOLDERS, location, paraphrases, sentence
from perennial.suites.libero import Libero
from perennial.suites.libero_retain import GENERALIST, TARGETS, LiberoRetain
from perennial.suites.libero_study import LiberoStudy
from perennial.suites.libero_wrist import LiberoWrist
from perennial.testing.suite_conformance import (
    CHECKS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = Libero()
GOLDEN = Path(__file__).parents[1] / "golden" / "libero.npz"
REST = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


def test_reading_the_tasks_imports_no_simulator():
    code = (
        "import sys; from perennial.suites.libero import Libero; s = Libero(); "
        "assert len(s.tasks) == 130 and s.tasks['long-7'].horizon == 520; "
        "assert not {'libero', 'robosuite', 'mujoco'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("suite", "count", "horizon"),
    [("spatial", 10, 220), ("object", 10, 280), ("goal", 10, 300), ("long", 10, 520), ("90", 90, 400)],
)
def test_both_conventions_of_horizons(suite, count, horizon):
    """OpenVLA's evaluation has one for each suite; the study of the simple recipe has 512 for all."""
    names = [f"{suite}-{i}" for i in range(count)]
    assert {SUITE.tasks[name].horizon for name in names} == {horizon}
    assert {LiberoStudy().tasks[name].horizon for name in names} == {512}
    assert f"{suite}-{count}" not in SUITE.tasks


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("spatial-9", "pick up the black bowl on the wooden cabinet and place it on the plate"),
        ("object-5", "pick up the tomato sauce and place it in the basket"),
        ("goal-7", "turn on the stove"),
        ("long-2", "turn on the stove and put the moka pot on it"),
    ],
)
def test_the_robot_is_told_what_libero_tells_it(name, told):
    """The policy is evaluated with LIBERO's sentence; in the study it is trained with it as well."""
    assert SUITE.tasks[name].evaluation_instruction == told
    assert LiberoStudy().tasks[name].instructions == (told,)


def test_paraphrases_differ_from_the_sentence_and_say_all_its_words():
    for suite, files in FILES.items():
        for file in files:
            told = sentence(file)
            polite, other = paraphrases(told)
            assert len({told, polite, other}) == 3, (suite, file)
            assert set(told.split()) <= set(polite.split())


def test_the_sequences_are_those_of_the_study():
    """Spatial 0-4, object 5-9 and long 3-7 are taught; the rest of each suite is held out."""
    for suite, trained in (("spatial", range(5)), ("object", range(5, 10)), ("long", range(3, 8))):
        sequence = SUITE.sequences[suite]
        assert sequence.trained == tuple(f"{suite}-{i}" for i in trained)
        assert set(sequence.trained + sequence.held_out) == {f"{suite}-{i}" for i in range(10)}


@pytest.mark.parametrize("task", [name for name in SUITE.tasks if not name.startswith("90-")])
def test_sentences_of_every_task(task):
    """Only LIBERO-90 repeats sentences: two of its tasks share theirs with another suite's."""
    sequences_name_tasks_once(SUITE, task)
    if task in ("goal-7", "long-5"):
        with pytest.raises(AssertionError, match="90-"):
            sentences_of_evaluation_are_never_trained(SUITE, task)
    else:
        sentences_of_evaluation_are_never_trained(SUITE, task)


def test_retain_has_three_targets_and_five_tasks_of_each_other_suite():
    assert TARGETS == ("long-2", "long-4", "long-7")
    assert len(GENERALIST) == 20
    assert [name for name in GENERALIST if name.startswith("90-")] == ["90-0", "90-18", "90-36", "90-54", "90-72"]
    sequences_name_tasks_once(LiberoRetain(), "long-2")


def test_a_shift_of_retain_is_refused_for_other_tasks():
    with pytest.raises(PerennialError, match="long-4"):
        LiberoRetain().make("spatial-0", "medium")


@pytest.mark.parametrize(("task", "variant"), [("spatial-10", "id"), ("spatial-0", "lights")])
def test_unknown_names_are_answered_with_the_nearest(task, variant):
    with pytest.raises(PerennialError, match="Did you mean"):
        SUITE.make(task, variant)


def test_a_missing_simulator_is_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerennialError, match=r"run pip install -c constraints\.txt -e '\.\[libero\]' in"):
        _libero_install.package()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder that pretends to be the installed package, and a home without anything in it."""
    monkeypatch.setattr(_libero_install, "package", lambda: tmp_path / "package")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def complete(folder):
    for kind in _libero_install._KINDS:
        (folder / kind).mkdir(parents=True)
    return folder


def test_missing_assets_are_one_sentence_with_the_folder_and_the_variable(installed, monkeypatch):
    with pytest.raises(PerennialError, match=r"package/assets.*PERENNIAL_LIBERO_ASSETS"):
        _libero_install.assets()
    complete(installed / "home" / ".cache" / "libero" / "assets")
    assert _libero_install.assets() == installed / "home" / ".cache" / "libero" / "assets"
    monkeypatch.setenv("PERENNIAL_LIBERO_ASSETS", str(installed / "mine"))
    with pytest.raises(PerennialError, match="mine"):
        _libero_install.assets()
    assert complete(installed / "mine") == _libero_install.assets()


def test_the_doctor_says_what_is_missing(installed, monkeypatch):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda name: None)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "not installed")
    monkeypatch.setattr("perennial.doctor.installed_version", {"hf-libero": "0.1.4"}.get)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "0.1.4 without its assets")
    assert "PERENNIAL_LIBERO_ASSETS" in check.fix
    complete(installed / "package" / "assets")
    (check,) = SUITE.doctor()
    assert check.status == "ok"
    assert LiberoStudy().doctor() == []


def test_the_config_is_written_into_our_own_folder(installed):
    folder = _libero_install._write_config(installed / "package", installed / "assets")
    assert folder == installed / "cache" / "perennial" / "libero"
    written = json.loads((folder / "config.yaml").read_text())
    assert written["assets"] == str(installed / "assets")
    assert set(written) == {"benchmark_root", "bddl_files", "init_states", "datasets", "assets"}


@needs_libero
def test_a_users_config_is_respected(libero, tmp_path):  # noqa: F811
    """A config.yaml is neither changed nor looked past, and the import asks nothing on an empty standard input."""
    code = (
        "import os; from perennial.suites import _libero_install; _libero_install.prepare(); "
        "import libero.libero; print(libero.libero.config_file)"
    )
    for name, content in (("mine", "assets: /elsewhere\n"), ("empty", None)):
        folder = tmp_path / name
        folder.mkdir()
        if content:
            (folder / "config.yaml").write_text(content)
        environment = {**__import__("os").environ, "LIBERO_CONFIG_PATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if content:
            assert done.stdout.strip() == str(folder / "config.yaml")
            assert (folder / "config.yaml").read_text() == content
        else:
            assert "perennial/libero" in done.stdout
            assert not list(folder.iterdir())


@needs_libero
def test_tasks_are_those_of_the_benchmark(libero):  # noqa: F811
    _libero_install.prepare()
    from libero.libero.benchmark import grab_language_from_filename
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    for suite, folder in FOLDERS.items():
        assert list(FILES[suite]) == libero_task_map[folder]
        for place, file in enumerate(FILES[suite]):
            assert location(f"{suite}-{place}") == (folder, file)
            assert sentence(file) == grab_language_from_filename(f"{file}.bddl")


def theirs(task, index, size=None):
    """LIBERO's own environment after its own reset and ten steps at rest, and what it observed."""
    from libero.libero.envs.env_wrapper import ControlEnv

    from perennial.suites._libero_simulation import FOLDER, stored_states

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


@needs_libero
@pytest.mark.parametrize("task", ["object-5", "long-2"])
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


@needs_libero
def test_drawn_beginnings_are_those_of_liberos_reset(libero):  # noqa: F811
    """Also where furniture that a reset moves carries things, after another beginning was drawn."""
    SUITE.make("spatial-9").close()
    from perennial.suites._libero_simulation import Scene

    scene = Scene(("spatial-9", "id", "", 0))
    reference, _ = theirs("spatial-9", 0)
    for seed in (5, 6):
        reference.seed(seed)
        reference.env.reset()
        scene.draw(seed)
        np.testing.assert_array_equal(scene.sim.data._data.qpos, reference.sim.data._data.qpos)
        np.testing.assert_array_equal(scene.model.body_pos, reference.sim.model._model.body_pos)


@needs_libero
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


@needs_libero
@pytest.mark.parametrize("task", ["object-0"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(libero, check, task):  # noqa: F811
    check(SUITE, task)


@needs_libero
def test_many_resets_do_not_take_more_memory(libero):  # noqa: F811
    environment = SUITE.make("object-0")
    for index in range(5):
        start(environment, index, "demonstration")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(40):
        start(environment, index % 7, ("demonstration", "evaluation")[index % 2])
    environment.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


@needs_libero
@pytest.mark.skipif(bool(NAMED), reason="golden frames belong to the shared assets, and others are named")
@pytest.mark.parametrize("task", ["spatial-0", "object-0", "goal-0", "long-4"])
def test_first_frames_are_golden(libero, task):  # noqa: F811
    """The first evaluation state of a task of each suite, within what two OpenGL libraries may differ by."""
    environment = LiberoWrist().make(task, image_size=32)
    start(environment, 0, "evaluation")
    seen = environment.render().astype(int)
    environment.close()
    with np.load(GOLDEN) as golden:
        assert np.abs(seen - golden[task]).mean() < 2
        assert abs(seen.mean() - golden[task].mean()) < 1, "darker or brighter"


@needs_libero
def test_retain_moves_things_and_adds_others(libero):  # noqa: F811
    """Distractors stand on the table of long-7 in another room, the same ones for ten episodes."""
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
