"""Whole toy runs with RETAIN: the search is logged and reported, and a run killed in it ends the same."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from perennial import config as configuration
from perennial import experiment
from perennial.errors import PerennialError
from perennial.evaluation.standalone import of_run
from perennial.merging.checkpoints import merge_checkpoints
from perennial.reports import merging, page, summary
from perennial.reports.record import read
from perennial.storage.run_folder import RunFolder
from perennial.strategies.retain import Retain
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import essence, toy_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    ToyPolicy(0).save(folder)
    return folder


def searching(base):
    return toy_config(base, strategies=(Retain(alpha=(0.0, 0.5, 1.0), variant="ood_val", episodes=6),))


def merges(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "strategy"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return experiment.start(searching(base), "toy", tmp_path_factory.mktemp("runs") / "whole")


def test_every_task_is_merged_by_the_best_of_what_was_tried(run):
    rows = merges(run)
    assert [(row["task"], row["task_index"]) for row in rows] == [("left", 1), ("right", 2)]
    for row in rows:
        rates = {trial["alpha"]["action"]: trial["successes"] / trial["episodes"] for trial in row["tried"]}
        assert list(rates) == [0.0, 0.5, 1.0]
        assert row["alpha"]["action"] == min(alpha for alpha in rates if rates[alpha] == max(rates.values()))


@pytest.mark.parametrize("after", [1, 5])
def test_a_run_killed_in_the_search_ends_the_same(base, run, tmp_path, monkeypatch, after):
    collect, calls = experiment._collect, []

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return collect(*arguments, **settings)

    monkeypatch.setattr(experiment, "_collect", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.start(searching(base), "toy", tmp_path / "run")
    experiment.resume(tmp_path / "run")
    assert essence(tmp_path / "run") == essence(run)


def test_the_adapter_of_every_task_is_one_of_the_base_whatever_was_merged_before(base, tmp_path):
    """Merging after a task never moves the base, so what a run leaves of any task can be merged into it."""
    run = experiment.start(toy_config(base, strategies=(Retain(alpha=(0.5,)),)), "toy", tmp_path / "run")
    for number, task in enumerate(("left", "right"), 1):
        out = tmp_path / task
        merge_checkpoints(base, run / "tasks" / f"{number:02d}-{task}", out, alpha=1.0)
        expected = of_run(RunFolder.open(run), number, 0).policy.acting_weights()
        assert any(not torch.equal(expected[n], w) for n, w in ToyPolicy.load(base).acting_weights().items())
        for name, weights in ToyPolicy.load(out).acting_weights().items():
            torch.testing.assert_close(weights, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_run_whose_base_changed_is_neither_resumed_nor_evaluated(tmp_path):
    ToyPolicy(0).save(tmp_path / "base")
    run = experiment.start(toy_config(tmp_path / "base"), "toy", tmp_path / "run")
    shutil.rmtree(run / "evaluations" / "02")  # so that something is left to do
    shutil.rmtree(tmp_path / "base")
    ToyPolicy(1).save(tmp_path / "base")
    for again in (experiment.resume, lambda folder: of_run(RunFolder.open(folder), -1, 0)):
        with pytest.raises(PerennialError, match=r"adapter was trained on other weights \(.*base\)"):
            again(run)


def test_the_report_shows_coefficients_shares_and_the_search(run, capsys):
    told = summary.report_json(run)["accounts"]
    assert [row["strategy"] for row in told] == ["retain", "retain"]
    text = page.render(run)
    assert text.count("data-merge=") == 2
    assert text.count("Success by alpha, ") >= 2
    best = told[1]["alpha"]["language"]
    summary.print_summary(run, Console(width=200))
    tried = sum(trial["episodes"] for trial in told[1]["tried"])
    assert f"Merged right with alpha {best:g}, the best of 3 candidates in {tried} episodes." in capsys.readouterr().out


def test_shares_are_of_what_the_gate_carried_on(base, tmp_path):
    """Of an update merged with 0.5 and carried on by half, a quarter is in the weights; nothing of one rolled back."""
    told = read(experiment.start(toy_config(base, strategies=(Retain(alpha=(0.5,)),)), "toy", tmp_path / "run"))
    free = [dict(merge["shares"]) for merge in merging.merges(told)]
    assert free == [{"base": "50", "left": "50"}, {"base": "25", "left": "25", "right": "50"}]
    gates = [{"task_index": 1, "kept": 0.5}, {"task_index": 2, "kept": 0.0}]
    gated = [dict(merge["shares"]) for merge in merging.merges(replace(told, gates=gates))]
    assert gated == [{"base": "75", "left": "25"}, {"base": "75", "left": "25", "right": "0"}]


def test_a_run_without_merging_has_no_such_section(base, tmp_path):
    run = experiment.start(toy_config(base), "toy", tmp_path / "plain")
    assert "data-merge" not in page.render(run)
    assert summary.report_json(run)["accounts"] == []


def test_a_search_in_a_variant_that_the_suite_lacks_is_refused(base):
    wrong = replace(searching(base), strategies=(Retain(alpha=(0.5, 1.0), variant="ood_vall"),))
    with pytest.raises(PerennialError, match=r"ood_vall.*ood_val"):
        configuration.validate(wrong)
