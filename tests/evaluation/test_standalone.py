"""`perennial evaluate` on runs and checkpoints of the toy suite."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from perennial import cli, experiment
from perennial.errors import PerennialError
from perennial.evaluation import standalone
from perennial.learning.optimizer import AdamWConfig
from perennial.rollout.workers import WorkerConfig, start_workers
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.strategies.expansion import Expansion
from toyhouse.runs import TOY

TASKS = ("left", "right", "up-left")


@pytest.mark.parametrize(("after", "row"), [(0, 0), (1, 1), (-1, 2)])
@pytest.mark.parametrize(("temperature", "decoder"), [(1.0, "sampled"), (0.0, "greedy")])
def test_a_standalone_evaluation_agrees_with_the_matrix(run, capsys, after, row, temperature, decoder):
    cli.main(["evaluate", str(run), "--json", f"--after={after}", "--episodes=6", f"--temperature={temperature}"])
    told = json.loads(capsys.readouterr().out)["tasks"]
    cells = RunFolder.open(run).cells()
    assert [entry["task"] for entry in told] == list(TASKS)
    for entry in told:
        assert entry["n"] == 6
        assert entry["value"] == pytest.approx(100 * np.mean(cells[Cell(row, decoder, "id", entry["task"])].successes))
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_what_is_not_said_is_as_in_the_run(config, tmp_path, capsys, no_report):
    evaluation = replace(config.evaluation, temperature=2.5, decoders=("sampled",), variants=("ood_test", "id"))
    run = experiment.start(replace(config, seed=3, evaluation=evaluation), "toy", tmp_path / "other")
    capsys.readouterr()
    cli.main(["evaluate", str(run), "--json", "--episodes=6"])
    told = json.loads(capsys.readouterr().out)
    assert (told["variant"], told["temperature"], told["seed"]) == ("ood_test", 2.5, 3)
    cells = RunFolder.open(run).cells()
    for entry in told["tasks"]:
        same = cells[Cell(2, "sampled", "ood_test", entry["task"])].successes
        assert entry["value"] == pytest.approx(100 * np.mean(same))


def test_a_checkpoint_is_loaded_in_the_type_that_is_asked_for(toy_checkpoint, monkeypatch):
    cast = []
    monkeypatch.setattr(
        standalone, "start_workers", lambda config, given, weights: cast.append((given, weights)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", str(toy_checkpoint), f"--suite={TOY}", f"--policy={TOY}", "--dtype=bfloat16", "--seed=4"])
    (given, weights), *_ = cast
    assert (given.dtype, given.device, given.seed) == ("bfloat16", "cpu", 4)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_standalone_evaluation_lets_the_strategy_choose_the_weights(config, tmp_path, capsys, no_report):
    eager = replace(config.recipe[0], iterations=4, optimizer=AdamWConfig(learning_rate=5e-2, warmup_steps=1))
    evaluation = replace(config.evaluation, episodes=40, decoders=("sampled",))
    changes = {"recipe": (eager,), "strategies": (Expansion(),), "evaluation": evaluation}
    run = experiment.start(replace(config, **changes), "toy", tmp_path / "expansion")
    capsys.readouterr()
    told = {}
    for after in (1, 2):
        cli.main(["evaluate", str(run), "--json", f"--after={after}"])
        told |= {(after, entry["task"]): entry["value"] for entry in json.loads(capsys.readouterr().out)["tasks"]}
    for (row, task), value in told.items():
        outcome = RunFolder.open(run).cell(Cell(row, "sampled", "id", task))
        assert value == pytest.approx(100 * np.mean(outcome.successes))
    # The adapter of the first task still acts there, whatever was learned later.
    assert told[1, "left"] == told[2, "left"]
    assert told[1, "right"] != told[2, "right"]


def test_a_standalone_evaluation_takes_a_bare_checkpoint(run, toy_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(standalone, "WorkerConfig", lambda: WorkerConfig("inline", slots=8))
    options = [f"--suite={TOY}", f"--policy={TOY}", "--tasks", "right", "left", "--episodes=6", "--json"]
    cli.main(["evaluate", str(toy_checkpoint), *options])
    told = json.loads(capsys.readouterr().out)["tasks"]
    cells = RunFolder.open(run).cells()
    assert [(entry["task"], entry["value"]) for entry in told] == [
        (task, pytest.approx(100 * np.mean(cells[Cell(0, "sampled", "id", task)].successes)))
        for task in ("right", "left")
    ]


@pytest.mark.parametrize(("options", "count"), [([], 1), (["--workers=3"], 3)])
def test_a_standalone_evaluation_has_the_workers_of_the_run_unless_told_otherwise(run, monkeypatch, options, count):
    started = []

    def note(config, *rest):
        started.append(config)
        return start_workers(config, *rest)

    monkeypatch.setattr(standalone, "start_workers", note)
    cli.main(["evaluate", str(run), "--json", "--tasks=left", "--episodes=2", *options])
    assert started == [WorkerConfig("inline", count=count, slots=8)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--after=3", r"--after is 3; it must be -1 \(the newest\) to 2"),
        ("--after=-2", r"--after is -2; it must be -1"),
        ("--tasks=lefft", r"'lefft'\. Did you mean left"),
        ("--variant=od_test", r"'od_test'\. Did you mean ood_test"),
        ("--episodes=0", r"--episodes is 0, but it must be above 0"),
        ("--temperature=-1", r"--temperature is -1\.0, but it must be 0 or more"),
        ("--device=gpu", r"--device is 'gpu', but it must be cpu, cuda or cuda:<number>"),
        ("--workers=-1", r"--workers is -1, but it must be 0 or more"),
        ("--suite=metaworld", r"is a run, which has a suite and a policy of its own; leave out --suite and --policy"),
        (f"--policy={TOY}", r"is a run, which has a suite and a policy of its own; leave out --suite and --policy"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(run, option, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(run), option])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_checkpoint_has_learned_no_task(toy_checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(toy_checkpoint), f"--suite={TOY}", f"--policy={TOY}", "--after=2"])
    assert "is no run, so it has not learned 2 tasks; leave out --after" in capsys.readouterr().err


def test_damaged_or_missing_weights_are_not_evaluated(run, tmp_path):
    copy = RunFolder.open(shutil.copytree(run, tmp_path / "copy"))
    adapter = copy.path / "tasks" / "02-right" / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"?")
    with pytest.raises(PerennialError, match=r"adapter_model\.safetensors is damaged: its SHA-256"):
        standalone.of_run(copy, 2, seed=0)
    shutil.rmtree(copy.path / "tasks" / "01-left")
    with pytest.raises(PerennialError, match=r"has no weights of 'left'; continue it .* else restore"):
        standalone.of_run(copy, 1, seed=0)
