"""Cloning a base policy, with the toy suite and policy."""

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from perennial import commands, pretraining
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.storage.atomic import verify
from perennial.testing.toy import ToyPolicy

TOY = "perennial.testing.toy"


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    record_all(TOY, ("left", "right"), 4, folder, workers=1, settings=Settings(image_size=8))
    return folder


def options(demonstrations, out, **changes):
    return commands.Pretrain(
        demonstrations, out, **{"steps": 3, "batch_size": 8, "suite": TOY, "policy": TOY, **changes}
    )


def test_a_checkpoint_that_cannot_be_measured_is_kept(demonstrations, tmp_path, monkeypatch):
    def fail(*_):
        raise PerennialError("no simulator")

    monkeypatch.setattr(pretraining, "measure", fail)
    with pytest.raises(PerennialError, match="no simulator"):
        pretraining.pretrain(options(demonstrations, tmp_path / "out"), Console(quiet=True))
    verify(tmp_path / "out")
    ToyPolicy.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["success"] == {}
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretraining, "clone", lambda *_: pytest.fail("it is cloned already"))
    monkeypatch.setattr(pretraining, "measure", lambda *_: {"left": {"greedy": 1.0}})
    pretraining.pretrain(options(demonstrations, tmp_path / "out"), Console(quiet=True))
    verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["success"] == {"left": {"greedy": 1.0}}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_what_was_measured_is_written_down(demonstrations, tmp_path, monkeypatch):
    measured = {"left": {"sampled": 0.5, "greedy": 1.0}}
    monkeypatch.setattr(pretraining, "measure", lambda *_: measured)
    pretraining.pretrain(options(demonstrations, tmp_path / "out"), Console(quiet=True))
    verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["success"] == measured


class Killed(BaseException):
    pass


def killed_at(monkeypatch, passed):
    """Let the process stop after `passed` steps."""
    augmented, steps = pretraining.augmented, []

    def once(*arguments):
        steps.append(1)
        if len(steps) == passed + 1:
            raise Killed
        return augmented(*arguments)

    monkeypatch.setattr(pretraining, "augmented", once)
    return steps


@pytest.mark.parametrize(("passed", "left"), [(3, 12), (4, 8), (9, 4)])
def test_what_was_killed_goes_on_and_ends_with_the_same_weights(demonstrations, tmp_path, monkeypatch, passed, left):
    monkeypatch.setattr(pretraining, "COMMIT_STEPS", 4)
    asked = {"steps": 12, "episodes": 0}
    pretraining.pretrain(options(demonstrations, tmp_path / "whole", **asked), Console(quiet=True))
    steps = killed_at(monkeypatch, passed)
    with pytest.raises(Killed):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", **asked), Console(quiet=True))
    assert not (tmp_path / "out").exists()
    pretraining.pretrain(options(demonstrations, tmp_path / "out", **asked), Console(quiet=True))
    assert len(steps) == passed + 1 + left
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_what_was_killed_goes_on_with_the_threads_that_it_began_with(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr("perennial.machine.cores", lambda: 3)
    killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", steps=4, episodes=0), Console(quiet=True))
    monkeypatch.setattr("perennial.machine.cores", lambda: 2)
    torch.set_num_threads(1)
    pretraining.pretrain(options(demonstrations, tmp_path / "out", steps=4, episodes=0), Console(quiet=True))
    assert torch.get_num_threads() == 3


def test_a_commit_that_was_cut_off_leaves_the_one_before(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "COMMIT_STEPS", 4)
    asked = {"steps": 12, "episodes": 0}
    pretraining.pretrain(options(demonstrations, tmp_path / "whole", **asked), Console(quiet=True))
    steps = killed_at(monkeypatch, 9)
    with pytest.raises(Killed):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", **asked), Console(quiet=True))
    commit = tmp_path / "out.unfinished" / "commit"
    commit.rename(commit.with_name(".commit.former.1.partial"))  # as between the two renames of a commit
    commit.with_name(".commit.new.1.partial").mkdir()
    pretraining.pretrain(options(demonstrations, tmp_path / "out", **asked), Console(quiet=True))
    assert len(steps) == 10 + 4
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"steps": 8}, {"learning_rate": 2e-3}, {"seed": 1}, {"tasks": ("left",)}, {"width": 2.0}]
)
def test_it_does_not_go_on_with_something_else(demonstrations, tmp_path, monkeypatch, changes):
    killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        pretraining.pretrain(options(demonstrations, tmp_path / "out"), Console(quiet=True))
    with pytest.raises(PerennialError, match=f"out.unfinished was begun with {next(iter(changes))} .*; repeat that"):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", **changes), Console(quiet=True))


@pytest.mark.parametrize("out", ["out", ".", "..", "/"])
def test_a_folder_that_is_there_is_not_replaced(demonstrations, tmp_path, monkeypatch, out):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PerennialError, match=f"^{re.escape(out)} exists already"):
        pretraining.pretrain(options(demonstrations, Path(out)), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"episodes": -1}, "--episodes is -1; it must be at least 0"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above 0"),
        ({"width": 0.0}, "--width is 0.0; it must be a multiple of 0.5 above 0"),
        ({"width": 0.3}, "--width is 0.3; it must be a multiple of 0.5 above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(demonstrations, tmp_path, changes, message):
    with pytest.raises(PerennialError, match=message):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", **changes), Console(quiet=True))
    assert not (tmp_path / "out").exists()
