"""Cloning a base policy, with the toy suite and policy."""

import json

import pytest
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


def test_what_was_measured_is_written_down(demonstrations, tmp_path, monkeypatch):
    measured = {"left": {"sampled": 0.5, "greedy": 1.0}}
    monkeypatch.setattr(pretraining, "measure", lambda *_: measured)
    pretraining.pretrain(options(demonstrations, tmp_path / "out"), Console(quiet=True))
    verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pretraining.json").read_text())["success"] == measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"episodes": -1}, "--episodes is -1; it must be at least 0"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(demonstrations, tmp_path, changes, message):
    with pytest.raises(PerennialError, match=message):
        pretraining.pretrain(options(demonstrations, tmp_path / "out", **changes), Console(quiet=True))
    assert not (tmp_path / "out").exists()
