"""A run whose micro-batch was chosen by the free memory, stopped and resumed where there is another amount of it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from perennial import experiment
from perennial.config import Evaluation, Tasks
from perennial.interrupt import InterruptedRunError
from perennial.planning import check
from perennial.policies._anatomy import Anatomy, Layer, Visit
from perennial.session import Session
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import essence, toy_config

ONE = Visit(1)
ANATOMY = Anatomy((Layer("language", 10, 10, ONE, ONE), Layer("action", 10**6, 1, ONE, ONE, bias=False)), {}, 4)
"""Of which a row keeps 4 MB."""


@pytest.fixture
def memory(monkeypatch):
    """Says how much is free."""
    monkeypatch.setattr(ToyPolicy, "anatomy", classmethod(lambda cls, folder, instruction: ANATOMY))
    monkeypatch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")
    return lambda room: monkeypatch.setattr(check, "_free", lambda device: room)


def micro_batch(run):
    return json.loads((run / "run.json").read_text())["config"]["recipe"][0]["optimizer"]["micro_batch"]


def adapter(run):
    return load_file(max((run / "commits").iterdir()) / "adapter" / "adapter_model.safetensors")


def test_a_resumed_run_keeps_the_micro_batch_that_it_began_with(memory, toy_checkpoint, tmp_path, monkeypatch):
    config = toy_config(toy_checkpoint, evaluation=Evaluation(episodes=1, decoders=("greedy",), film=0))
    config = replace(config, tasks=Tasks(("left",)))
    memory(150e6)
    run = experiment.start(config, "toy", tmp_path / "run")
    assert micro_batch(run) == 16

    def commit_and_stop(session, cursor):
        commit(session, cursor)
        raise InterruptedRunError("after the first iteration")

    commit = Session.commit
    monkeypatch.setattr(Session, "commit", commit_and_stop)
    with pytest.raises(InterruptedRunError):
        experiment.start(config, "toy", tmp_path / "stopped")
    monkeypatch.setattr(Session, "commit", commit)
    memory(1e12)
    experiment.resume(tmp_path / "stopped")
    assert essence(tmp_path / "stopped") == essence(run)

    other = experiment.start(config, "toy", tmp_path / "other")
    assert micro_batch(other) == 256
    small, large = adapter(run), adapter(other)
    assert any(not torch.equal(small[name], large[name]) for name in small), "rounding did not differ"
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, large[name], rtol=1e-3, atol=1e-4)
