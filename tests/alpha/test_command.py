import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from perennial.alpha import command
from perennial.alpha.sweep import sweep
from perennial.cli import main
from perennial.commands import Alpha
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.evaluation.race import Runner
from perennial.policies._groups import GROUPS
from perennial.policies.base import Batch, Observation
from perennial.randomness import stream
from perennial.rollout.workers import WorkerConfig
from perennial.testing.toy import STEP, ToyPolicy, ToySuite

TOY = "perennial.testing.toy"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base that can do nothing, and what was made of it by imitating one who goes left."""
    folder = tmp_path_factory.mktemp("pair")
    policy = ToyPolicy(0)
    policy.save(folder / "base")
    states = stream(0, "states").uniform(-1, 1, (512, 2)).astype(np.float32)
    target = np.array(ToySuite.targets["left"], np.float32)
    first = np.clip((target - states) / STEP, -1, 1)
    second = np.clip((target - states) / STEP - first, -1, 1)
    words = tuple(ToySuite.tasks["left"].instructions[i % 2] for i in range(512))
    batch = Batch(
        Observation(np.full((512, 1, 8, 8, 3), 20, np.uint8), words, states),
        policy.encode(np.stack([first, second], 1)),
        np.ones((512, 4), bool),
    )
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        policy.imitation_loss(batch).mean().backward()
        optimizer.step()
    policy.save(folder / "finetuned")
    return folder / "base", folder / "finetuned"


def options(folders, tmp_path, **changes):
    settings = {
        "tasks": ("left",),
        "alpha": "0,0.5,1",
        "episodes": 30,
        "suite": TOY,
        "policy": TOY,
        "out": tmp_path / "alpha.html",
    }
    return Alpha(*folders, **(settings | changes))


def test_the_sweep_finds_what_was_learned_and_says_how_to_merge(folders, tmp_path, capsys):
    command.command(options(folders, tmp_path, json=True), Console())
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "alpha.json").read_text())
    by_alpha = {candidate["alpha"]["vision"]: candidate for candidate in found["candidates"]}
    assert by_alpha[1.0]["target"]["value"] > 80 > 40 > by_alpha[0.0]["target"]["value"]
    assert by_alpha[0.0]["dropped"]
    assert by_alpha[0.0]["target"]["n"] < 30 == by_alpha[1.0]["target"]["n"]
    best = found["candidates"][found["best"]]
    assert not best["dropped"]
    assert found["command"].endswith(f"-o merged --alpha {best['alpha']['vision']:g}")
    page = (tmp_path / "alpha.html").read_text()
    assert page.count("data-alpha=") == 3
    assert found["command"] in page


def test_retention_weighs_what_the_base_could_do(folders, tmp_path):
    """The generalist's task is one that the fine-tuned policy no longer can: swapping the roles makes the base best."""
    base, finetuned = folders
    swapped = options((finetuned, base), tmp_path, tasks=("right",), generalist=("left",), alpha="0,1")
    chosen = {}
    for retention in (0.0, 1.0):
        out = tmp_path / f"{retention}.html"
        command.command(Alpha(**(vars(swapped) | {"retention": retention, "out": out})), Console(quiet=True))
        chosen[retention] = json.loads(out.with_suffix(".json").read_text())
    best = chosen[1.0]["candidates"][chosen[1.0]["best"]]
    assert best["alpha"]["action"] == 0.0
    assert best["generalist"]["value"] > 80
    assert best["front"]


def test_no_state_is_played_twice(folders, tmp_path, monkeypatch):
    """The same states again would be no new evidence for the race."""
    monkeypatch.setattr(ToySuite, "states", lambda self, task, split, variant="id": 12 if task == "left" else None)
    command.command(options(folders, tmp_path, generalist=("right",), alpha="0,1"), Console(quiet=True))
    found = json.loads((tmp_path / "alpha.json").read_text())
    assert found["plan"]["episodes"] == 12
    assert max(candidate["target"]["n"] for candidate in found["candidates"]) == 12


def test_what_left_the_race_pushes_nothing_off_the_front(folders, tmp_path, monkeypatch):
    """Its rates are of few rounds; here they are better by luck than those of the one that ran to the end."""
    lucky, whole = np.ones((5, 2), bool), np.ones((30, 2), bool)
    whole[:10] = False
    monkeypatch.setattr(command, "sweep", lambda *_: [Runner(lucky, dropped=True), Runner(whole)])
    command.command(options(folders, tmp_path, generalist=("right",), alpha="0,1"), Console(quiet=True))
    found = json.loads((tmp_path / "alpha.json").read_text())
    assert [candidate["front"] for candidate in found["candidates"]] == [False, True]


def test_groups_make_a_grid_and_the_command_names_them(folders, tmp_path):
    made = options(folders, tmp_path, alpha="1", language="0,1", episodes=5)
    command.command(made, Console(quiet=True))
    found = json.loads((tmp_path / "alpha.json").read_text())
    assert [c["alpha"]["language"] for c in found["candidates"]] == [0.0, 1.0]
    flags = ("--alpha.vision 1 --alpha.language 0 --alpha.action 1", "--alpha 1")
    assert found["command"].endswith(flags[found["best"]])
    assert "Success by alpha of language" in (tmp_path / "alpha.html").read_text()


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        ([(0, 0, 0), (1, 1, 1)], ""),
        ([(1, 0, 1), (1, 0.5, 1), (1, 1, 1)], "language"),
        ([(0.2, 0, 1), (0.4, 0, 1)], "vision"),
        ([(1, 0, 0), (1, 1, 1)], None),
        ([(1, 0, 0)], None),
    ],
)
def test_a_curve_needs_one_thing_that_varies(alphas, expected):
    assert command.varying([dict(zip(GROUPS, each, strict=True)) for each in alphas]) == expected


def test_without_episodes_the_demonstrations_choose_and_nothing_is_played(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("there is no simulator"))
    recorded = {name: tmp_path / name for name in ("demonstrations", "pretraining")}
    for folder, task in zip(recorded.values(), ("left", "right"), strict=True):
        record_all(TOY, (task,), 2, folder, 1, lambda path: None, Settings(image_size=8, image_every=2))
    command.command(options(folders, tmp_path, episodes=0, **recorded), Console(quiet=True))
    found = json.loads((tmp_path / "alpha.json").read_text())
    sums = [candidate["target_loss"] + candidate["base_loss"] for candidate in found["candidates"]]
    assert found["best"] == found["without_rollouts"] == sums.index(min(sums))
    assert not any("target" in candidate for candidate in found["candidates"])
    page = (tmp_path / "alpha.html").read_text()
    assert "by the least sum of both losses; nothing was played." in page
    assert page.count("<figure>") == 1
    assert page.count("data-alpha=") == 3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tasks": ()}, "No task is named"),
        ({"tasks": ("lefft",)}, "lefft.*left"),
        ({"variant": "ood"}, "ood.*ood_val"),
        ({"alpha": "0,1.5"}, "--alpha is '0,1.5'"),
        ({"alpha": ""}, "--alpha is ''"),
        ({"out": Path("alpha.json")}, r"--out is alpha\.json, but it must be the file of a page"),
        ({"language": "x"}, "alpha.language"),
        ({"episodes": 0}, "--episodes is 0, so that nothing is played"),
        ({"episodes": 0, "pretraining": Path("x")}, "--episodes is 0, so that nothing is played"),
        ({"episodes": -1}, "--episodes is -1"),
        ({"demonstrations": Path("x")}, "no demonstration of left in 'x'.*--demonstrations"),
        ({"pretraining": Path("x")}, "no demonstration in 'x'.*--pretraining"),
        ({"device": "tpu"}, "--device is 'tpu', but it must be cpu"),
        ({"retention": 2.0}, "--retention is 2"),
        ({"workers": -1}, "--workers is -1"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_is_loaded(tmp_path, wrong, sentence):
    with pytest.raises(PerennialError, match=sentence):
        command.command(options((tmp_path / "no", tmp_path / "nothing"), tmp_path, **wrong), Console(quiet=True))


@pytest.mark.parametrize("taken", ["alpha.html", "alpha.json"])
def test_what_an_earlier_sweep_found_is_not_overwritten(folders, tmp_path, monkeypatch, taken):
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("hours of playing would be lost"))
    (tmp_path / taken).write_text("earlier")
    with pytest.raises(PerennialError, match=rf"{taken} exists already; name another page by --out"):
        command.command(options(folders, tmp_path), Console(quiet=True))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "earlier")]


@pytest.mark.parametrize("count", [0, 3])
def test_it_plays_in_as_many_workers_as_asked_for(folders, tmp_path, monkeypatch, count):
    asked = []

    def note(pair, plan, candidates, cast, workers, on_episodes):
        asked.append((workers, cast.dtype))
        return sweep(pair, plan, candidates, cast, WorkerConfig("inline"), on_episodes)

    monkeypatch.setattr(command, "sweep", note)
    command.command(
        options(folders, tmp_path, alpha="1", episodes=2, workers=count, dtype="float32"), Console(quiet=True)
    )
    assert asked == [(WorkerConfig(count=count), "float32")]


def test_the_dotted_flags_are_understood(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["alpha", str(tmp_path), str(tmp_path), "--tasks", "door-open-v3", "--alpha.language", "0,2"])
    assert "--alpha.language is '0,2'" in capsys.readouterr().err
