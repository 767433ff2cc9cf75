"""Runs of the toy suite that go on: what is there stays, what is lost is made again, and nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from perennial import experiment, session
from perennial.learning.grpo import GRPO
from perennial.rollout.workers import InlineWorkers
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.strategies.composition import Strategies
from toyhouse.runs import essence, snapshot

TASKS = ("left", "right", "up-left")


def test_a_lost_cell_of_a_finished_run_is_played_again(run, tmp_path, no_report):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "evaluations" / "01" / "sampled" / "id" / "left.json").unlink()
    experiment.resume(copy)
    assert RunFolder.open(copy).cells() == RunFolder.open(run).cells()


def test_a_row_that_cannot_be_played_again_is_told(run, tmp_path, no_report, capsys):
    copy = shutil.copytree(run, tmp_path / "copy [1]")
    (copy / "evaluations" / "01" / "greedy" / "id" / "up-left.json").unlink()
    shutil.rmtree(copy / "tasks" / "01-left")
    experiment.resume(copy)
    said = capsys.readouterr().out
    assert said.startswith(f"Run: {copy}\n")
    assert "Row 1 of the success matrix stays incomplete:" in said
    assert f"{copy} has no weights of 'left'" in said
    assert f"Report: {copy}/report/index.html" in said.splitlines()  # neither wrapped nor taken for markup


def test_resuming_a_finished_run_only_writes_its_report_again(run, monkeypatch):
    before = snapshot(run)
    shutil.rmtree(run / "report")
    monkeypatch.setattr(InlineWorkers, "collect", lambda *_: pytest.fail("an episode was played"))
    experiment.resume(run)
    assert snapshot(run) == before
    assert (run / "report" / "index.html").is_file()


def test_the_report_of_a_finished_run_needs_nothing_but_its_folder(config, toy_checkpoint, tmp_path, capsys):
    base = shutil.copytree(toy_checkpoint, tmp_path / "base")
    alone = replace(config, policy=replace(config.policy, checkpoint=str(base)))
    run = experiment.start(alone, "toy", tmp_path / "run")
    report = (run / "report" / "index.html").read_bytes()
    for gone in (base, run / "report"):
        shutil.rmtree(gone)
    capsys.readouterr()
    experiment.resume(run)
    assert (run / "report" / "index.html").read_bytes() == report
    assert capsys.readouterr().out == f"Report: {run}/report/index.html\n"


def test_a_run_is_not_finished_without_its_last_films(config, tmp_path, monkeypatch, no_report):
    filmed = []
    monkeypatch.setattr(experiment.video, "encode", lambda frames, target, fps: filmed.append(target))
    run = experiment.start(replace(config, evaluation=replace(config.evaluation, film=24)), "toy", tmp_path / "run")
    filmed.clear()
    experiment.resume(run)
    assert filmed == [run / "videos" / "02" / f"{task}.mp4" for task in TASKS]


def test_a_lost_cell_is_played_again_and_nothing_else(run, tmp_path, no_report):
    copy = shutil.copytree(run, tmp_path / "copy")
    cell = copy / "evaluations" / "02" / "greedy" / "id" / "right.json"
    cell.unlink()
    experiment.resume(copy)
    assert essence(copy) == essence(run)


@pytest.mark.parametrize("between", ["log", "write_cell"])
def test_a_cell_has_one_line_of_timings_wherever_its_evaluation_stopped(
    run, config, tmp_path, monkeypatch, no_report, between
):
    """In the base row, before the first commit, and in the row after the first task."""
    folder, whole = tmp_path / "run", getattr(RunFolder, between)
    for number in (2, 5):
        calls = iter(range(100))

        def stop(self, first, *rest, calls=calls, number=number):
            evaluated = isinstance(first, Cell) or rest[0]["event"] == "evaluation"
            if evaluated and next(calls) == number:
                raise ZeroDivisionError
            whole(self, first, *rest)

        monkeypatch.setattr(RunFolder, between, stop)
        with pytest.raises(ZeroDivisionError):
            experiment.resume(folder) if folder.exists() else experiment.start(config, "toy", folder)
    monkeypatch.setattr(RunFolder, between, whole)
    experiment.resume(folder)
    assert essence(folder) == essence(run)
    timings = [row for row in RunFolder.open(folder).rows("timings") if row["event"] == "evaluation"]
    told = sorted(str((row["row"], row["decoder"], row["variant"], row["task"])) for row in timings)
    assert told == sorted(str((c.row, c.decoder, c.variant, c.task)) for c in RunFolder.open(folder).cells())


@pytest.fixture
def before_the_last_task_ended(run, tmp_path):
    """The same run, killed after the last iteration of the last task and before anything that follows it."""
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(max((copy / "commits").iterdir()))
    shutil.rmtree(copy / "tasks" / "02-right")
    shutil.rmtree(copy / "evaluations" / "02")
    assert RunFolder.open(copy).latest().state["cursor"] == {"phase": 1, "stage": 0, "iteration": 2}
    return copy


def test_a_lost_cell_of_an_earlier_row_is_played_with_the_weights_of_then(run, before_the_last_task_ended, no_report):
    copy = before_the_last_task_ended
    (copy / "evaluations" / "00" / "greedy" / "id" / "up-left.json").write_text("{")
    (copy / "evaluations" / "01" / "greedy" / "id" / "right.json").unlink()
    experiment.resume(copy)
    assert essence(copy) == essence(run)


def test_only_a_resumed_run_counts_as_begun_when_its_memory_is_checked(
    config, before_the_last_task_ended, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(session, "check_memory", lambda config, begun: seen.append(begun) or 1 / 0)
    for go in (
        lambda: experiment.start(config, "toy", tmp_path / "new"),
        lambda: experiment.resume(before_the_last_task_ended),
    ):
        with pytest.raises(ZeroDivisionError):
            go()
    assert seen == [False, True]


def test_a_resumed_run_has_the_threads_that_it_began_with(config, tmp_path, monkeypatch, no_report):
    with monkeypatch.context() as patch:
        patch.setattr("perennial.machine.cores", lambda: 3)
        patch.setattr(Strategies, "after_task", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            experiment.start(replace(config, threads=0), "toy", tmp_path / "run")
    seen = []

    def counted(inner):
        return lambda *arguments: seen.append(torch.get_num_threads()) or inner(*arguments)

    torch.set_num_threads(1)
    monkeypatch.setattr("perennial.machine.cores", lambda: 2)
    monkeypatch.setattr(GRPO, "update", counted(GRPO.update))
    for hook in ("after_task", "remember"):
        monkeypatch.setattr(Strategies, hook, counted(getattr(Strategies, hook)))
    experiment.resume(tmp_path / "run")
    assert seen == [3] * 6  # the end of a task, with no iteration left to learn, two iterations, and an end


def test_a_run_that_does_not_know_its_threads_has_one_for_each_core(run, tmp_path, monkeypatch, no_report):
    begun = tmp_path / "run"
    shutil.copytree(run / "evaluations" / "00", begun / "evaluations" / "00")
    header = json.loads((run / "run.json").read_text())
    del header["config"]["threads"]
    header["config"]["description"] = "runs of that time had one"
    (begun / "run.json").write_text(json.dumps(header))
    seen = []
    monkeypatch.setattr("perennial.machine.cores", lambda: 2)
    monkeypatch.setattr(GRPO, "update", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.resume(begun)
    assert seen == [2]
