import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from libero_assets import WITH_ASSETS, libero, needs_libero, unpacked  # noqa: F401
from packaging.requirements import Requirement

from perennial.errors import PerennialError
from perennial.suites._libero import install as libero_install
from perennial.suites._libero import variants as libero_variants
from perennial.suites._libero.tasks import FILES, FOLDERS, location, paraphrases, sentence
from perennial.suites.libero import Libero
from perennial.suites.libero_retain import GENERALIST, TARGETS, LiberoRetain
from perennial.suites.libero_study import LiberoStudy
from perennial.suites.libero_wrist import LiberoWrist
from perennial.testing.suite_conformance import (
    CHECKS,
    memory_is_given_back,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = Libero()


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


@pytest.mark.parametrize(("suite", "training", "evaluation"), [(SUITE, 40, 10), (LiberoStudy(), 50, 50)])
def test_stored_states_are_finite_and_drawn_ones_are_not(suite, training, evaluation):
    for variant in ("id", "camera"):
        assert (suite.states("spatial-0", "training", variant), suite.states("spatial-0", "evaluation", variant)) == (
            training,
            evaluation,
        )
    assert suite.states("spatial-0", "demonstration") is None


def test_rewritten_problems_have_ever_new_states():
    suite = LiberoRetain()
    assert suite.states("long-2", "evaluation") == suite.states("spatial-0", "training") == 50
    assert {suite.states("long-2", "evaluation", variant) for variant in suite.variants[1:]} == {None}


def test_retain_has_three_targets_and_five_tasks_of_each_other_suite():
    assert TARGETS == ("long-2", "long-4", "long-7")
    assert len(GENERALIST) == 20
    assert [name for name in GENERALIST if name.startswith("90-")] == ["90-0", "90-18", "90-36", "90-54", "90-72"]
    sequences_name_tasks_once(LiberoRetain(), "long-2")


@pytest.mark.parametrize("suite", [Libero(), LiberoWrist()])
def test_forty_stored_states_are_for_training_and_the_other_ten_for_evaluation(suite):
    stored = suite.protocol.stored
    assert set(stored) == {"training", "evaluation"}, "demonstrations draw new ones"
    assert (len(stored["training"]), len(stored["evaluation"])) == (40, 10)
    assert sorted((*stored["training"], *stored["evaluation"])) == list(range(50))
    assert not suite.shares


@pytest.mark.parametrize("suite", [LiberoStudy(), LiberoRetain()])
def test_published_protocols_share_all_stored_states_and_say_so(suite):
    assert {split: list(stored) for split, stored in suite.protocol.stored.items()} == {
        "training": list(range(50)),
        "evaluation": list(range(50)),
    }
    assert suite.shares == {"states", "sentences"}


@pytest.mark.parametrize(
    ("suite", "task", "variant", "named"),
    [(LiberoRetain(), "spatial-0", "medium", "long-4"), (LiberoStudy(), "object-0", "cam2", "spatial-9")],
)
def test_a_variant_of_some_tasks_is_refused_for_others(suite, task, variant, named):
    with pytest.raises(PerennialError, match=named):
        suite.make(task, variant)
    with pytest.raises(PerennialError, match=named):
        suite.check(task, variant)
    suite.check(named, variant)


@pytest.mark.parametrize(("task", "variant"), [("spatial-10", "id"), ("spatial-0", "lights")])
def test_unknown_names_are_answered_with_the_nearest(task, variant):
    with pytest.raises(PerennialError, match="Did you mean"):
        SUITE.make(task, variant)


def test_a_missing_simulator_is_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerennialError, match=r"^LIBERO is not installed; run `make setup-libero` in .*") as raised:
        SUITE.require_simulator()
    assert ".venv-libero/bin/perennial" in str(raised.value)
    assert "an environment of its own (docs/suites.md says" in str(raised.value)
    assert "pip install" not in str(raised.value), "it would break transformers in the environment that is active"


def test_an_import_that_fails_says_the_same(installed, monkeypatch):
    complete(installed / "package" / "assets")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.delitem(sys.modules, "libero.libero", raising=False)
    monkeypatch.delitem(sys.modules, "perennial.suites._libero.simulation", raising=False)
    with pytest.raises(PerennialError, match=r"cannot be imported .*; run `make setup-libero` in .* of its own"):
        SUITE.make("object-0")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder that pretends to be the installed package, and a home without anything in it."""
    monkeypatch.setattr(libero_install, "package", lambda: tmp_path / "package")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def complete(folder):
    for kind in libero_install._KINDS:
        (folder / kind).mkdir(parents=True)
    return folder


def test_missing_assets_are_one_sentence_with_the_folder_and_the_variable(installed, monkeypatch):
    with pytest.raises(PerennialError, match=r"package/assets.*PERENNIAL_LIBERO_ASSETS") as raised:
        libero_install.assets()
    assert f"--local-dir {installed / 'home' / '.cache' / 'libero' / 'assets'}" in str(raised.value)
    assert "python" not in str(raised.value), "importing LIBERO asks a question"
    complete(installed / "home" / ".cache" / "libero" / "assets")
    assert libero_install.assets() == installed / "home" / ".cache" / "libero" / "assets"
    monkeypatch.setenv("PERENNIAL_LIBERO_ASSETS", str(installed / "mine"))
    with pytest.raises(PerennialError, match="mine"):
        SUITE.require_simulator()
    assert complete(installed / "mine") == libero_install.assets()


def test_the_doctor_says_what_is_missing(installed, monkeypatch):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda name: None)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "not installed")
    versions = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "mujoco": "3.3.2"}
    monkeypatch.setattr("perennial.doctor.installed_version", versions.get)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "0.1.4 without its assets")
    assert "PERENNIAL_LIBERO_ASSETS" in check.fix
    complete(installed / "package" / "assets")
    (check,) = SUITE.doctor()
    assert check.status == "ok"
    assert LiberoStudy().doctor() == []
    versions["mujoco"] = "3.3.3"
    (check,) = SUITE.doctor()
    assert (check.status, "MuJoCo 3.3.3" in check.finding, "3.3.0" in check.fix) == ("problem", True, True)
    versions["robosuite"] = "1.5.2"
    (check,) = SUITE.doctor()
    assert (check.status, "robosuite 1.5.2" in check.finding) == ("problem", True)
    assert "an environment of its own" in check.fix


def test_the_extra_asks_for_releases_that_the_doctor_does_not_refuse():
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["libero"]
    wanted = {requirement.name: requirement.specifier for requirement in map(Requirement, extra)}
    assert "3.3.3" not in wanted["mujoco"]
    assert libero_install.LAST_MUJOCO in wanted["mujoco"]
    assert libero_install.ROBOSUITE in wanted["robosuite"]


def test_the_config_is_written_into_our_own_folder(installed):
    folder = libero_install._write_config(installed / "package", installed / "assets")
    assert folder == installed / "cache" / "perennial" / "libero"
    written = json.loads((folder / "config.yaml").read_text())
    assert written["assets"] == str(installed / "assets")
    assert set(written) == {"benchmark_root", "bddl_files", "init_states", "datasets", "assets"}


@needs_libero
def test_a_users_config_is_respected(libero, tmp_path):  # noqa: F811
    """A config.yaml is neither changed nor looked past, and the import asks nothing on an empty standard input."""
    code = (
        "import os; from perennial.suites._libero import install as libero_install; libero_install.prepare(); "
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
    libero_install.prepare()
    from libero.libero.benchmark import grab_language_from_filename
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    for suite, folder in FOLDERS.items():
        assert list(FILES[suite]) == libero_task_map[folder]
        for place, file in enumerate(FILES[suite]):
            assert location(f"{suite}-{place}") == (folder, file)
            assert sentence(file) == grab_language_from_filename(f"{file}.bddl")


CONFORMING = [(check, SUITE, "object-0") for check in CHECKS] + [
    (check, suite, task)
    for check in CHECKS
    if check is not memory_is_given_back  # slow, and of the same scenes
    for suite, task in ((LiberoWrist(), "goal-0"), (LiberoStudy(), "spatial-0"), (LiberoRetain(), "long-7"))
]


@needs_libero
@pytest.mark.parametrize(
    ("check", "suite", "task"), [pytest.param(*of, id=f"{of[1].name}-{of[0].__name__}") for of in CONFORMING]
)
def test_conformance(libero, monkeypatch, check, suite, task):  # noqa: F811
    monkeypatch.setattr(libero_variants, "_DISTRACTORS", WITH_ASSETS)
    check(suite, task)
