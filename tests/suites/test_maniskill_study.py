import importlib.util
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from perennial.errors import PerennialError
from perennial.suites import maniskill_study
from perennial.suites._maniskill import install, on_plate, plate_expert
from perennial.suites.maniskill_study import ManiSkillStudy
from perennial.testing.suite_conformance import (
    CHECKS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = ManiSkillStudy()
NAMED = os.environ.get(on_plate.ASSETS)
THINGS = ("carrot", "bread", "ketchup bottle", "fast food cup", "watering can", "pipe", "toy bear", "hamburger")


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder like RL4VLA's, and the robot where ManiSkill keeps what it downloads; the meshes are empty."""
    root = tmp_path / "carrot"
    boxes = {"bbox": {"min": [-0.01, -0.02, 0.0], "max": [0.03, 0.02, 0.05]}, "density": 500}
    for kind, names in {"more_carrot": THINGS, "more_plate": ("plate",)}.items():
        keys = [on_plate.PLATE] if kind == "more_plate" else [f"{i:03}_{name}_1" for i, name in enumerate(names)]
        for key in keys:
            (root / kind / key).mkdir(parents=True)
            (root / kind / key / "collision.obj").touch()
            (root / kind / key / "textured.glb").touch()
        entries = {key: {"name": name, **boxes} for key, name in zip(keys, names, strict=True)}
        (root / kind / "model_db.json").write_text(json.dumps(entries))
    (root / "more_table" / "imgs").mkdir(parents=True)
    pictures = [f"{i}.png" for i in range(21)]
    for i, name in enumerate(pictures):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(root / "more_table" / "imgs" / name)
    (root / "more_table" / "model_db.json").write_text(json.dumps({name: {} for name in pictures}))
    robot = tmp_path / "maniskill" / "data" / "robots" / "widowx"
    robot.mkdir(parents=True)
    (robot / "wx250s.urdf").touch()
    monkeypatch.setenv(on_plate.ASSETS, str(root))
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "maniskill"))
    return tmp_path


def test_the_tasks_of_the_simple_recipe():
    """Four are taught and four held out, with one sentence each and a horizon of 80 steps."""
    sequence = SUITE.sequences["simple_recipe"]
    assert sequence.trained == (
        "PutCarrotOnPlate",
        "PutBreadOnPlate",
        "PutKetchupBottleOnPlate",
        "PutFastFoodCupOnPlate",
    )
    assert sequence.held_out == ("PutWateringCanOnPlate", "PutPipeOnPlate", "PutToyBearOnPlate", "PutHamburgerOnPlate")
    assert {task.horizon for task in SUITE.tasks.values()} == {80}
    assert SUITE.tasks["PutFastFoodCupOnPlate"].instructions == ("put fast food cup on plate",)


@pytest.mark.parametrize("task", list(SUITE.tasks))
def test_sentences_and_sequences(task):
    sentences_of_evaluation_are_never_trained(SUITE, task)
    sequences_name_tasks_once(SUITE, task)


@pytest.mark.parametrize(("variant", "tables"), [("id", 1), ("tables", 15)])
def test_states_are_all_combinations_of_photograph_places_and_turn(variant, tables):
    """Counted in whole numbers: points of a grid with 3 cm between neighbours, more than 7 cm apart."""
    grid = [(x, y) for x in range(6) for y in range(6)]
    pairs = [(a, b) for a in grid for b in grid if 9 * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) > 49]
    assert on_plate.states(variant) == tables * len(pairs) * 4 // 3
    assert SUITE.states("PutPipeOnPlate", "training", variant) == on_plate.states(variant)


@pytest.mark.parametrize(("variant", "tables"), [("id", {0}), ("tables", set(range(1, 16)))])
def test_no_two_states_are_the_same_and_things_lie_on_the_table_apart(variant, tables):
    found = [on_plate.layout(variant, number) for number in range(3 * on_plate.states(variant))]
    assert len(set(found)) == len(found)
    assert on_plate.layout(variant, 3 * on_plate.states(variant) + 7) == found[7]
    thing, plate = (np.array([getattr(layout, name) for layout in found]) for name in ("thing", "plate"))
    assert np.linalg.norm(thing - plate, axis=1).min() > 0.07
    for places in (thing, plate):
        np.testing.assert_allclose(places.min(0), [-0.235, -0.075])
        np.testing.assert_allclose(places.max(0), [-0.085, 0.075])
    assert {layout.table for layout in found} == tables
    assert {round(np.degrees(layout.yaw)) for layout in found} == {0, 45, 90, 135}


def test_the_first_states_of_a_split_have_no_pattern():
    """Of the first 160 training states, as many as the paper trains on, every turn and place has its share."""
    found = [on_plate.layout("id", 3 * index + 1) for index in range(160)]
    turns = np.bincount([round(layout.yaw / (np.pi / 4)) for layout in found], minlength=4)
    assert turns.min() >= 25
    assert len({layout.thing for layout in found}) >= 34


PLATE = np.array([0.055, 0.055, 0.003])
THING = np.array([0.02, 0.03, 0.01])


@pytest.mark.parametrize(
    ("offset", "force", "wanted"),
    [
        ([0.0, 0.0, 0.013], 1.0, True),
        ([0.0, 0.0649, 0.013], 1.0, True),
        ([0.0, 0.0651, 0.013], 1.0, False),
        ([0.046, 0.046, 0.013], 1.0, False),
        ([0.0, 0.0, 0.0629], 1.0, True),
        ([0.0, 0.0, 0.0631], 1.0, False),
        ([0.0, 0.0, -0.001], 1.0, False),
        ([0.0, 0.0, 0.013], 0.031, True),
        ([0.0, 0.0, 0.013], 0.029, False),
    ],
)
def test_what_counts_as_lying_on_the_plate(offset, force, wanted):
    """At most 0.055 + 0.01 m aside, at most 0.003 + 0.01 + 0.05 m above, with more than 0.03 N."""
    assert on_plate.lies(np.array(offset), THING, PLATE, force) is wanted


def test_a_model_is_found_by_the_words_of_the_task(files):
    model = on_plate.thing("fast food cup")
    assert model.folder.name == "003_fast food cup_1"
    np.testing.assert_allclose(model.extent, [0.04, 0.04, 0.05])
    np.testing.assert_allclose(model.centre, [0.01, 0.0, 0.025])
    assert (model.density, model.visual.name) == (500.0, "textured.glb")
    (model.folder / "textured.dae").touch()
    assert model.visual.name == "textured.dae"
    assert on_plate.plate().folder.name == on_plate.PLATE
    assert [file.name for file in on_plate.tables()] == [f"{i}.png" for i in range(16)]
    with pytest.raises(PerennialError, match="knows no 'spoon'"):
        on_plate.thing("spoon")


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("carrot/more_carrot/000_carrot_1/collision.obj", r"no file .*000_carrot_1/collision\.obj"),
        ("carrot/more_carrot/000_carrot_1/textured.glb", r"no file .*textured\.glb"),
        ("carrot/more_carrot/model_db.json", r"no file .*more_carrot/model_db\.json"),
        ("carrot/more_plate/001_plate_simpler/collision.obj", r"no file .*001_plate_simpler"),
        ("carrot/more_table/imgs/15.png", r"no file .*15\.png"),
        ("maniskill/data/robots/widowx/wx250s.urdf", r"robot .*download_asset widowx250s"),
    ],
)
def test_what_is_missing_is_named(files, file, told):
    SUITE.check("PutCarrotOnPlate")
    (files / file).unlink()
    with pytest.raises(PerennialError, match=told):
        SUITE.check("PutCarrotOnPlate")


def test_without_the_models_a_task_is_refused_with_the_line_that_fetches_them(monkeypatch):
    monkeypatch.delenv(on_plate.ASSETS, raising=False)
    with pytest.raises(
        PerennialError, match=r"git clone https://github\.com/gen-robot/RL4VLA` and set PERENNIAL_PLATE"
    ):
        SUITE.make("PutPipeOnPlate")
    with pytest.raises(PerennialError, match="Did you mean PutPipeOnPlate"):
        SUITE.make("PutPipesOnPlate")


def test_the_doctor_asks_for_the_models_only_where_maniskill_is(files, monkeypatch):
    monkeypatch.setattr("perennial.doctor.installed_version", lambda name: None)
    assert SUITE.doctor() == []
    monkeypatch.setattr("perennial.doctor.installed_version", {"mani_skill": "3.0.1"}.get)
    (check,) = SUITE.doctor()
    assert check.status == "ok"
    (files / "carrot" / "more_carrot" / "007_hamburger_1" / "collision.obj").unlink()
    (check,) = SUITE.doctor()
    assert (check.status, "hamburger" in check.fix) == ("warning", True)


def test_actions_are_metres_radians_and_an_opening(files, monkeypatch):
    asked = []
    simulation = SimpleNamespace(
        begin=lambda seed: None, advance=lambda action: bool(asked.append(action)), state=np.zeros(8, np.float32)
    )
    module = SimpleNamespace(put_on_plate=lambda *named: asked.append(named) or simulation)
    monkeypatch.setattr(maniskill_study, "simulator", lambda: module)
    environment = SUITE.make("PutToyBearOnPlate", "tables")
    start(environment)
    environment.step(np.array([1, -1, 0.02, 2, -2, 0.1, -3], np.float32))
    assert asked[0] == ("toy bear", "tables")
    np.testing.assert_array_equal(asked[1], np.float32([0.05, -0.05, 0.02, 0.25, -0.25, 0.1, 0]))


@pytest.mark.parametrize(("bar", "hand", "turn"), [(0, 0, 0), (0, 80, -80), (90, 20, 70), (30, 0, 30), (-30, 0, -30)])
def test_fingers_close_on_the_narrow_side(bar, hand, turn):
    """At a yaw of 0 they close along y, across a bar along x; the turn is the shorter way round."""
    extent = np.array([0.12, 0.03, 0.03])
    yaw, found = plate_expert._grip(Rotation.from_euler("z", bar, degrees=True), extent, np.radians(hand))
    assert found == pytest.approx(np.radians(turn), abs=np.radians(2.5))
    assert yaw == pytest.approx(np.radians(hand) + found)


def missing():
    if importlib.util.find_spec("mani_skill") is None:
        return "ManiSkill is not installed"
    try:
        if install.renderer() == "cpu":
            install.software_driver()
        SUITE.check("PutCarrotOnPlate")
    except PerennialError as error:
        return str(error)
    return ""


needs_scene = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")


@pytest.fixture
def models(monkeypatch):
    """RL4VLA's own files, where the user has them."""
    monkeypatch.setenv(on_plate.ASSETS, str(NAMED))


@needs_scene
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(SUITE, "PutCarrotOnPlate")


@needs_scene
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("task", ["PutCarrotOnPlate", "PutKetchupBottleOnPlate", "PutPipeOnPlate"])
def test_the_expert_succeeds(task):
    environment, ended = SUITE.make(task), []
    for index in range(5):
        start(environment, index, "demonstration")
        done = False
        while not done:
            *_, terminated, truncated, _info = environment.step(plate_expert.put_on_plate(environment))
            done = terminated or truncated
        ended.append(terminated)
    environment.close()
    assert ended == [True] * 5


@needs_scene
@pytest.mark.usefixtures("models")
def test_success_is_lying_on_the_plate():
    """A carrot let go above the plate succeeds, one that falls beside it or from high above it does not at once."""
    import sapien

    environment = SUITE.make("PutCarrotOnPlate")
    env = environment.simulation.env
    rest = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
    for aside, height, wanted in ((0.0, 0.03, True), (0.12, 0.03, False), (0.0, 0.4, False)):
        start(environment, 3)
        x, y, z = env.plate.pose.p[0].tolist()
        env.thing.set_pose(sapien.Pose([x + aside, y, z + height], [1, 0, 0, 0]))
        *_, info = environment.step(rest)
        assert info["is_success"] is wanted, (aside, height)
    environment.close()


@needs_scene
@pytest.mark.usefixtures("models")
def test_the_photograph_is_seen_wherever_nothing_of_the_scene_is():
    environment = SUITE.make("PutCarrotOnPlate", "tables", image_size=96)
    start(environment, 2)
    layout = on_plate.layout("tables", 3 * 2 + 1)
    photograph = Image.open(on_plate.tables()[layout.table]).convert("RGB")
    seen, behind = environment.render()[0], np.asarray(photograph.resize((96, 96), Image.Resampling.BOX))
    same = (seen == behind).all(-1)
    assert 0.8 < same.mean() < 0.98
    assert same[:, :8].all()
    assert same[-8:].all()
    red, green, blue = seen[~same].astype(int).T
    assert ((red > 1.5 * green) & (green > 1.5 * blue)).sum() >= 10, "the carrot is orange"
    environment.close()


@needs_scene
@pytest.mark.usefixtures("models")
def test_the_same_state_of_two_tasks_has_its_plate_at_the_same_place():
    layouts = []
    for task in ("PutCarrotOnPlate", "PutBreadOnPlate"):
        environment = SUITE.make(task)
        start(environment, 4, "evaluation")
        layouts.append(environment.simulation.env.plate.pose.p[0].numpy())
        environment.close()
    for plate in layouts:  # a thing that falls beside it may push it a little
        np.testing.assert_allclose(plate[:2], on_plate.layout("id", 14).plate, atol=5e-3)
