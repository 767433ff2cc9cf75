import importlib.util
import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from perennial.errors import PerennialError
from perennial.suites import maniskill
from perennial.suites._maniskill import experts as maniskill_experts
from perennial.suites._maniskill import install as maniskill_install
from perennial.suites.maniskill import ManiSkill
from perennial.suites.maniskill_study import ManiSkillStudy
from perennial.testing.suite_conformance import (
    CHECKS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = ManiSkill()


def missing():
    if importlib.util.find_spec("mani_skill") is None:
        return "ManiSkill is not installed"
    if maniskill_install.renderer() == "gpu":
        return ""
    try:
        maniskill_install.software_driver()
    except PerennialError as error:
        return str(error)
    return ""


needs_maniskill = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


def test_reading_the_tasks_imports_no_simulator():
    code = (
        "import sys; from perennial.suites.maniskill import ManiSkill; s = ManiSkill(); "
        "assert s.tasks['PickCube'].horizon == 50 and s.expert('PickCube') is not None; "
        "assert not {'mani_skill', 'sapien'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("task", list(SUITE.tasks))
def test_sentences_and_sequences(task):
    sentences_of_evaluation_are_never_trained(SUITE, task)
    sequences_name_tasks_once(SUITE, task)


@pytest.mark.parametrize(("task", "variant"), [("PickCub", "id"), ("PickCube", "ids")])
def test_unknown_names_are_answered_with_the_nearest(task, variant):
    with pytest.raises(PerennialError, match=r"Did you mean"):
        SUITE.make(task, variant)


def test_a_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    monkeypatch.delitem(sys.modules, "perennial.suites._maniskill.simulation", raising=False)
    monkeypatch.delattr("perennial.suites._maniskill.simulation", raising=False)
    with pytest.raises(PerennialError, match=r"cannot be imported .*; run `make setup-maniskill` in .* of its own"):
        SUITE.make("PickCube")


@pytest.mark.parametrize("suite", [SUITE, ManiSkillStudy()])
def test_a_missing_package_is_known_without_an_import(suite, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerennialError, match=r"^ManiSkill is not installed; run `make setup-maniskill` in .*"):
        suite.require_simulator()


@pytest.fixture
def drivers(tmp_path, monkeypatch):
    """An empty folder of Vulkan drivers on a machine without a GPU; gives the means to add one."""
    monkeypatch.setattr(maniskill_install, "_FOLDER", tmp_path)
    monkeypatch.setattr(maniskill_install, "_LOCAL", tmp_path / "local")
    monkeypatch.setattr(maniskill_install, "_GPU", tmp_path / "nvidia0")
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)

    def add(version, name="lvp_icd.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"ICD": {"api_version": version, "library_path": "x.so"}}))
        return tmp_path / name

    return add


def test_a_missing_or_old_vulkan_driver_is_explained_with_the_line_that_installs_one(drivers):
    with pytest.raises(PerennialError, match=r"no lvp_icd.*apt-get install -t bookworm-backports mesa-vulkan-drivers"):
        maniskill_install.software_driver()
    drivers("1.3.230")
    with pytest.raises(PerennialError, match=r"is of Vulkan 1\.3\.230"):
        maniskill_install.software_driver()
    drivers("1.4.305")
    assert maniskill_install.software_driver() == "lvp_icd.json, Vulkan 1.4.305"


def test_a_driver_that_is_named_is_used_instead(drivers, monkeypatch, tmp_path):
    drivers("1.4.305")
    monkeypatch.setenv("VK_ICD_FILENAMES", str(drivers("1.4.400", "mine.json")))
    assert maniskill_install.software_driver() == "mine.json, Vulkan 1.4.400"
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "gone.json"))
    with pytest.raises(PerennialError, match=r"VK_ICD_FILENAMES=.*gone\.json"):
        maniskill_install.software_driver()


def test_preparing_names_mesas_driver_unless_there_is_a_gpu_or_a_choice(drivers, monkeypatch, tmp_path):
    file = drivers("1.4.305")
    monkeypatch.setenv("VK_ICD_FILENAMES", "chosen.json")
    maniskill_install.prepare()
    assert maniskill_install.os.environ["VK_ICD_FILENAMES"] == "chosen.json"
    monkeypatch.delenv("VK_ICD_FILENAMES")
    (tmp_path / "nvidia0").touch()
    assert maniskill_install.renderer() == "cpu", "the GPU's driver is not here"
    drivers("1.4.303", "local/nvidia_icd.json")
    assert maniskill_install.renderer() == "gpu"
    maniskill_install.prepare()
    assert "VK_ICD_FILENAMES" not in maniskill_install.os.environ
    monkeypatch.setenv("VK_ICD_FILENAMES", str(file))
    assert maniskill_install.renderer() == "cpu", "Mesa's driver was chosen"
    monkeypatch.delenv("VK_ICD_FILENAMES")
    (tmp_path / "nvidia0").unlink()
    maniskill_install.prepare()
    assert maniskill_install.os.environ["VK_ICD_FILENAMES"] == str(file)
    monkeypatch.delenv("VK_ICD_FILENAMES")


def test_the_doctor_says_what_is_missing(drivers, monkeypatch):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda name: None)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "not installed")
    assert "make setup-maniskill" in check.fix
    assert "pip install" not in check.fix
    monkeypatch.setattr("perennial.doctor.installed_version", {"mani_skill": "3.0.1"}.get)
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("warning", "3.0.1 without Vulkan")
    assert "mesa-vulkan-drivers" in check.fix
    drivers("1.4.305")
    (check,) = SUITE.doctor()
    assert (check.status, check.finding) == ("ok", "3.0.1, lvp_icd.json, Vulkan 1.4.305")


class Recorded:
    """Writes down what the environment asks of the simulation; solved with the third step."""

    def __init__(self, task):
        self.task, self.seeds, self.actions = task, [], []
        self.state = np.zeros(8, np.float32)

    def begin(self, seed):
        self.seeds.append(seed)
        self.actions.clear()

    def advance(self, action):
        self.actions.append(action)
        return len(self.actions) == 3

    def look(self, size):
        return np.full((size, size, 3), 1, np.uint8)

    def film(self, size):
        return np.full((size, size, 3), 2, np.uint8)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(maniskill, "simulator", lambda: SimpleNamespace(table_top=Recorded))
    return SUITE.make("PushCube", image_size=16)


def test_no_two_splits_share_a_seed(recorded):
    for split in ("demonstration", "training", "evaluation"):
        for index in range(5):
            start(recorded, index, split)
    assert sorted(recorded.simulation.seeds) == list(range(15))
    recorded.reset(seed=4)
    start(recorded, 4, "training")
    assert recorded.simulation.seeds[-1] == recorded.simulation.seeds[-2]
    with pytest.raises(PerennialError, match="Did you mean training"):
        start(recorded, 0, "trainings")


def test_actions_are_clipped_and_success_ends_the_episode(recorded):
    _, info = start(recorded)
    assert info == {"is_success": False}
    ends = [recorded.step(np.array([2, -2, 0.5, 0, 0, 0, 1], np.float32)) for _ in range(3)]
    np.testing.assert_array_equal(recorded.simulation.actions[0], np.array([1, -1, 0.5, 0, 0, 0, 1], np.float32))
    assert [end[1:4] for end in ends] == [(0.0, False, False), (0.0, False, False), (1.0, True, False)]
    assert ends[-1][4] == {"is_success": True}


def test_the_horizon_truncates_and_a_reset_begins_anew(recorded, monkeypatch):
    monkeypatch.setattr(Recorded, "advance", lambda self, action: False)
    for _ in range(2):
        start(recorded)
        ends = [recorded.step(np.zeros(7, np.float32))[2:4] for _ in range(50)]
        assert ends == [(False, False)] * 49 + [(False, True)]


def test_actions_that_are_not_finite_are_refused(recorded):
    start(recorded)
    with pytest.raises(PerennialError, match="not finite"):
        recorded.step(np.full(7, np.nan, np.float32))


def test_policies_and_people_see_through_different_cameras(recorded):
    np.testing.assert_array_equal(recorded.render(), np.ones((1, 16, 16, 3), np.uint8))
    np.testing.assert_array_equal(recorded.film(24), np.full((24, 24, 3), 2, np.uint8))


def pose(place, turn):
    """A pose as ManiSkill gives it: batched, the quaternion with its real part first."""
    x, y, z, w = turn.as_quat()
    return SimpleNamespace(p=torch.tensor([place]), q=torch.tensor([[w, x, y, z]]))


DOWN = Rotation.from_euler("x", 180, degrees=True)


@pytest.mark.parametrize(
    ("cube", "hand", "turn"), [(30, 0, 30), (60, 0, -30), (-30, 0, -30), (10, 80, 20), (200, 0, 20)]
)
def test_the_hand_turns_the_short_way_to_a_side_of_the_cube(cube, hand, turn):
    grasped = pose([0.0, 0, 0], Rotation.from_euler("z", cube, degrees=True))
    yaw, found = maniskill_experts._askew(
        grasped, pose([0.0, 0, 0], Rotation.from_euler("z", hand, degrees=True) * DOWN)
    )
    np.testing.assert_allclose(np.degrees([yaw, found]), [hand, turn], atol=1e-9)


def test_commands_move_in_tenths_of_a_metre_and_turn_against_the_sign():
    """A hand that points down and must turn by 0.02 radians about z gets -0.4 at a gain of 20 per radian."""
    hand = pose([0.0, 0, 0], DOWN)
    action = maniskill_experts._command(hand, np.array([0.01, -1.0, 0.0]), 0.02, 1.0)
    np.testing.assert_allclose(action, [0.2, -1, 0, 0, 0, -0.4, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("hand", "way"),
    [
        ([0.0, 0.0, 0.1], [0.0, 0.0, -0.1]),
        ([0.004, 0.0, 0.1], [-0.004, 0.0, -0.1]),
        ([0.1, 0.0, 0.02], [0.0, 0.0, 0.08]),
        ([0.1, 0.0, 0.1], [-0.1, 0.0, 0.0]),
    ],
)
def test_the_hand_keeps_high_until_it_is_above(hand, way):
    found = maniskill_experts.towards(np.array(hand), np.zeros(3))
    np.testing.assert_allclose(found, way, atol=1e-9)


@needs_maniskill
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(SUITE, "PickCube")


@needs_maniskill
@pytest.mark.parametrize("task", ["PegInsertionSide", "StackCube"])
@pytest.mark.parametrize(
    "check", [check for check in CHECKS if "resets_forget" in check.__name__ or "shapes" in check.__name__]
)
def test_conformance_of_tasks_that_build_new_scenes_or_have_more_cameras(check, task):
    check(SUITE, task)


@needs_maniskill
@pytest.mark.parametrize("task", list(SUITE.tasks))
def test_episodes_are_those_of_maniskill_bit_for_bit(task):
    """The state of everything after other episodes is that of ManiSkill's own environment with the same seed."""
    environment = SUITE.make(task)
    start(environment, 1)
    environment.step(np.ones(7, np.float32))
    environment.render()
    start(environment, 2)
    import gymnasium

    reference = gymnasium.make(
        f"{task}-v1", num_envs=1, obs_mode="state", control_mode="pd_ee_delta_pose", sim_backend="cpu"
    )
    reference.reset(seed=3 * 2 + 1)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 7)).astype(np.float32):
        *_, info = environment.step(action)
        *_, theirs = reference.step(action)
        ours = environment.simulation.env.get_state()
        np.testing.assert_array_equal(ours.numpy(), reference.unwrapped.get_state().numpy())
        assert info["is_success"] == bool(theirs["success"].item())
    reference.close()
    environment.close()


@needs_maniskill
def test_the_goal_of_pick_cube_is_seen():
    """Green pixels, which ManiSkill's own sensors would hide."""
    environment = SUITE.make("PickCube", image_size=64)
    start(environment)
    red, green, blue = environment.render()[0].astype(int).transpose(2, 0, 1)
    environment.close()
    assert ((green > 1.5 * red) & (green > 1.5 * blue)).sum() >= 5


@needs_maniskill
def test_many_resets_do_not_take_more_memory():
    environment = SUITE.make("PushCube")
    for index in range(20):
        start(environment, index)
        environment.render()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(200):
        start(environment, index)
    environment.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


@needs_maniskill
def test_a_machine_without_vulkan_is_told_so_when_the_environment_is_made(tmp_path):
    """In a process of its own, for a driver that was loaded stays loaded."""
    code = (
        "from perennial.suites.maniskill import ManiSkill\n"
        "try:\n    ManiSkill().make('PushCube')\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    environment = {**__import__("os").environ, "VK_ICD_FILENAMES": str(tmp_path / "gone.json")}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert "PerennialError ManiSkill finds no Vulkan driver" in told
    assert "mesa-vulkan-drivers" in told
