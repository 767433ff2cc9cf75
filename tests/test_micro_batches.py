"""A run whose micro-batch was chosen by the free memory, killed and resumed where there is another amount of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from perennial import experiment
from perennial.planning import check
from perennial.policies._anatomy import Anatomy, Layer, Visit
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import essence, toy_config

ONE = Visit(1)
ANATOMY = Anatomy((Layer("language", 10, 10, ONE, ONE), Layer("action", 10**6, 1, ONE, ONE, bias=False)), {}, 4)
"""Of which a row keeps 4 MB."""


@pytest.fixture
def memory(monkeypatch):
    """Says how much is free."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(ToyPolicy, "anatomy", classmethod(lambda cls, folder, instruction: ANATOMY))
    monkeypatch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")
    yield lambda room: monkeypatch.setattr(check, "_free", lambda device: room)
    torch.set_num_threads(threads)


def test_a_resumed_run_keeps_the_micro_batch_that_it_began_with(memory, toy_checkpoint, tmp_path):
    config = toy_config(toy_checkpoint)
    memory(150e6)
    run = experiment.start(config, "toy", tmp_path / "run")
    header = json.loads((run / "run.json").read_text())
    assert header["config"]["recipe"][0]["optimizer"]["micro_batch"] == 16
    killed = shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(max((killed / "commits").iterdir()))
    shutil.rmtree(killed / "tasks" / "02-right")
    shutil.rmtree(killed / "evaluations" / "02")
    memory(1e12)
    experiment.resume(killed)
    assert essence(killed) == essence(run)
    other = experiment.start(config, "toy", tmp_path / "other")
    assert json.loads((other / "run.json").read_text())["config"]["recipe"][0]["optimizer"]["micro_batch"] == 256
    first, second = (
        load_file(max((path / "commits").iterdir()) / "adapter" / "adapter_model.safetensors") for path in (run, other)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first), "rounding did not differ"
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)
