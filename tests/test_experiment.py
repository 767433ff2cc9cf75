"""Whole runs with the toy suite: two tasks and one held out, played in this process."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from perennial import cli, experiment, overrides
from perennial.config import Config, Tasks
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.learning.grpo import GRPO
from perennial.learning.ppo import PPO
from perennial.planning.check import fit_micro_batches
from perennial.reports.record import read
from perennial.rollout.workers import Cast, InlineWorkers, WorkerConfig
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.strategies.composition import Strategies
from perennial.testing.toy import ToyPolicy, ToySuite
from toyhouse.runs import TOY, essence, snapshot

TASKS = ("left", "right", "up-left")


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_holds_what_it_promises(run, config):
    header = json.loads((run / "run.json").read_text())
    assert (header["format"], header["preset"]) == (1, "toy")
    assert overrides.from_json(Config, header["config"]) == fit_micro_batches(config)
    assert header["environment"]
    assert sorted(p.name for p in (run / "tasks").iterdir()) == ["01-left", "02-right"]
    for folder in ((run / "tasks" / "01-left"), max((run / "commits").iterdir())):
        assert (folder / "manifest.json").is_file()
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (folder / "adapter" / "adapter_config.json").is_file()
    # 2 tasks x (2 iterations + the end of the task), of which two commits are kept.
    assert sorted(p.name for p in (run / "commits").iterdir()) == ["000005", "000006"]
    assert not list((run).glob("videos/*"))


def test_a_value_head_lies_beside_the_adapter_and_acting_needs_none(config, tmp_path, no_report, capsys):
    recipe = (PPO(iterations=1, rollouts=8), replace(config.recipe[0], iterations=1))
    evaluation = replace(config.evaluation, episodes=2, decoders=("greedy",))
    run = experiment.start(
        replace(config, recipe=recipe, evaluation=evaluation, tasks=Tasks(("left",))), "toy", tmp_path / "run"
    )
    learned = run / "tasks" / "01-left"
    head = load_file(learned / "value_head.safetensors")
    fresh = ToyPolicy()
    fresh.add_value_head(config.seed)
    assert head.keys() == fresh.value_head.state_dict().keys()
    assert not torch.equal(head["0.weight"], fresh.value_head.state_dict()["0.weight"])
    assert not any("value_head" in name for name in load_file(learned / "adapter" / "adapter_model.safetensors"))
    assert [line["objective"] for line in lines(run / "metrics.jsonl") if line["event"] == "iteration"] == [
        "ppo",
        "grpo",
    ]
    cli.main(["evaluate", str(run), "--episodes", "2", "--tasks", "left"])
    assert "left" in capsys.readouterr().out


def test_the_matrix_is_complete(run, config):
    found = RunFolder.open(run).cells()
    assert set(found) == {
        Cell(row, decoder, "id", task) for row in range(3) for decoder in ("sampled", "greedy") for task in TASKS
    }
    for cell, outcome in found.items():
        assert len(outcome.successes) == len(outcome.env_steps) == config.evaluation.episodes
        horizon = ToySuite.tasks[cell.task].horizon
        assert all(0 < steps <= horizon for steps in outcome.env_steps)
        assert all(s or steps == horizon for s, steps in zip(outcome.successes, outcome.env_steps, strict=True))


def test_row_0_is_the_base_checkpoint_and_the_last_row_the_last_commit(run, toy_checkpoint):
    folder = RunFolder.open(run)
    base, learned = ToyPolicy.load(toy_checkpoint), ToyPolicy.load(toy_checkpoint)
    adapter = load_file(folder.latest().path / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in learned.model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in adapter:  # alpha / rank is 1
                parameter += adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
    workers = InlineWorkers(WorkerConfig("inline", slots=8), Cast(TOY, TOY, toy_checkpoint, 0), base.acting_weights())
    with closing(workers):
        for row, policy in ((0, base), (2, learned)):
            workers.broadcast(policy.acting_weights())
            for decoder, temperature in (("sampled", 1.0), ("greedy", 0.0)):
                for task in TASKS:
                    played = workers.collect(evaluation_episodes(ToySuite(), task, "id", 6, temperature))
                    outcome = folder.cell(Cell(row, decoder, "id", task))
                    assert outcome.successes == tuple(int(t.success) for t in played)
                    assert outcome.env_steps == tuple(int(t.steps.sum()) for t in played)


def test_metrics_tell_every_iteration_and_timings_every_wait(run):
    metrics = lines(run / "metrics.jsonl")
    assert [(row["task"], row["task_index"], row["stage"], row["iteration"]) for row in metrics] == [
        ("left", 1, 0, 0),
        ("left", 1, 0, 1),
        ("right", 2, 0, 0),
        ("right", 2, 0, 1),
    ]
    for row in metrics:
        assert (row["event"], row["objective"], row["episodes"]) == ("iteration", "grpo", 32)
        assert {"success", "env_steps", "loss", "kl", "clip_fraction", "grad_norm", "kept", "penalty"} <= set(row)
        assert "seconds" not in "".join(row)
    timings = lines(run / "timings.jsonl")
    learning = ["strategy", "iteration", "iteration", "strategy", "strategy"]
    assert [row["event"] for row in timings] == (["evaluation"] * 6 + learning) * 2 + ["evaluation"] * 6


def test_what_strategies_play_is_counted_once_however_often_the_run_stops(config, tmp_path, monkeypatch, no_report):
    played = []

    def play(strategies, task, policy, collect):
        played.append(collect(3) + collect(2, "right", first=5))
        if len(played) == 1:
            raise ZeroDivisionError

    monkeypatch.setattr(Strategies, "after_task", play)
    with pytest.raises(ZeroDivisionError):
        experiment.start(config, "toy", tmp_path / "run")
    experiment.resume(tmp_path / "run")
    told = [row for row in lines(tmp_path / "run" / "timings.jsonl") if row["event"] == "strategy"]
    assert [(row["task_index"], row["hook"], row["episodes"]) for row in told] == [
        (1, "before_task", 0),
        (1, "after_task", 5),
        (1, "remember", 0),
        (2, "before_task", 0),
        (2, "after_task", 5),
        (2, "remember", 0),
    ]
    steps = [sum(int(t.steps.sum()) for t in trajectories) for trajectories in played]
    assert len(steps) == 3
    assert [row["env_steps"] for row in told] == [0, steps[1], 0, 0, steps[2], 0]
    assert all(row["seconds"] >= 0 for row in told)


def test_a_report_is_written(run):
    assert (run / "report" / "index.html").stat().st_size > 1000
    json.loads((run / "report" / "report.json").read_text())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run, config, tmp_path, no_report):
    again = experiment.start(config, "toy", tmp_path / "again")
    assert essence(again) == essence(run)
    other = experiment.start(replace(config, seed=1), "toy", tmp_path / "other")
    differing = {name for name, content in essence(other).items() if content != essence(run)[name]}
    adapters = {
        f"{place}/adapter/adapter_model.safetensors" for place in ("commits/000006", "tasks/01-left", "tasks/02-right")
    }
    assert adapters | {"metrics.jsonl"} <= differing
    assert any(name.startswith("evaluations/02/sampled") for name in differing)


def test_adapters_differ_from_task_to_task(run):
    first, second = (
        load_file(run / "tasks" / name / "adapter" / "adapter_model.safetensors") for name in ("01-left", "02-right")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    last = load_file(max((run / "commits").iterdir()) / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(second[name], last[name]) for name in second)


class Stage:
    """Workers that play nothing and keep what they were asked for."""

    def follow(self, policy):
        self.followed = policy

    def collect(self, episodes):
        self.episodes = episodes
        return []


def test_what_a_strategy_plays_are_training_states_in_training_words(config):
    sampled = replace(config, evaluation=replace(config.evaluation, temperature=1.3))
    session = SimpleNamespace(workers=Stage(), suite=ToySuite(), config=sampled, policy=object())
    learned = ToySuite.tasks["right"]
    for asked, task, variant, first in (((), "right", "id", 0), (("left", "ood_val", 5), "left", "ood_val", 5)):
        experiment._collect(session, 1, Counter(), learned, 3, *asked)
        assert session.workers.followed is session.policy
        played = session.workers.episodes
        assert {(e.task, e.split, e.variant, e.temperature) for e in played} == {(task, "training", variant, 1.3)}
        assert [e.initial_state for e in played] == list(range(first, first + 3))
        assert {e.instruction for e in played} == set(ToySuite.tasks[task].instructions)
        assert len({e.key for e in played}) == 3


def test_a_run_that_could_not_begin_leaves_its_folder_free(config, tmp_path):
    (tmp_path / "base").mkdir()
    broken = replace(config, policy=replace(config.policy, checkpoint=str(tmp_path / "base")))
    with pytest.raises(PerennialError, match="no readable toy checkpoint"):
        experiment.start(broken, "toy", tmp_path / "runs" / "new")
    assert not (tmp_path / "runs" / "new").exists()
    with RunFolder.create(tmp_path / "runs" / "new", "toy", {}, {}):
        pass


def test_a_folder_with_a_run_in_it_is_refused(run, config):
    before = snapshot(run)
    with pytest.raises(PerennialError, match="is not empty; go on with the run in it by `perennial resume"):
        experiment.start(config, "toy", run)
    assert snapshot(run) == before


def test_a_run_knows_its_checkpoint_and_its_demonstrations_from_everywhere(
    config, toy_checkpoint, tmp_path, monkeypatch, no_report
):
    record_all(TOY, ("left", "right"), 1, tmp_path / "shown", workers=1, settings=Settings(image_size=8))
    (tmp_path / "base").symlink_to(toy_checkpoint)
    monkeypatch.chdir(tmp_path)
    changes = {"policy.checkpoint": "base", "recipe": "sft", "recipe.sft.demonstrations": "shown"}
    small = {"recipe.sft.iterations": "1", "recipe.sft.steps": "1", "recipe.sft.batch_size": "2"}
    run = experiment.start(overrides.apply(config, changes | small), "toy", tmp_path / "relative")
    written = json.loads((run / "run.json").read_text())["config"]
    assert written["policy"]["checkpoint"] == str(tmp_path / "base")
    assert written["recipe"][0]["demonstrations"] == str(tmp_path / "shown")


def test_a_run_that_somebody_writes_is_refused(run):
    with (
        RunFolder.open_locked(run),
        pytest.raises(PerennialError, match=rf"Process {os.getpid()} is writing"),
    ):
        experiment.resume(run)


def test_joint_learning_sees_all_tasks_at_once_with_the_budget_of_all(config, tmp_path, no_report):
    joint = experiment.start(replace(config, schedule="joint"), "toy", tmp_path / "joint")
    assert {cell.row for cell in RunFolder.open(joint).cells()} == {0, 1}
    metrics = lines(joint / "metrics.jsonl")
    assert [(row["task_index"], row["iteration"]) for row in metrics] == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [p.name for p in (joint / "tasks").iterdir()] == ["01-2 tasks"]


def test_every_parameter_can_learn_without_an_adapter(config, tmp_path, toy_checkpoint, no_report):
    full = replace(config, policy=replace(config.policy, adapter=None))
    run = experiment.start(full, "toy", tmp_path / "full")
    learned = load_file(run / "tasks" / "02-right" / "model.safetensors")
    base = ToyPolicy.load(toy_checkpoint).acting_weights()
    assert learned.keys() == base.keys()
    assert not torch.equal(learned["trunk.weight"], base["trunk.weight"])
    assert not (run / "tasks" / "02-right" / "adapter").exists()


def test_a_learner_that_plays_itself_does_what_its_copy_does(config, tmp_path, no_report):
    """Bit for bit where there is no adapter, whose merging would round."""
    full = replace(config, policy=replace(config.policy, adapter=None))
    copied, shared = (
        experiment.start(replace(full, workers=replace(full.workers, backend=name)), "toy", tmp_path / name)
        for name in ("inline", "shared")
    )
    assert essence(shared) == essence(copied)


def test_a_stage_moves_only_the_groups_that_learn(config, tmp_path, toy_checkpoint, no_report):
    (grpo,) = config.recipe
    stages = (replace(grpo, iterations=1, learns=("action",)), replace(grpo, iterations=1, learns=("vision",)))
    for number in (1, 2):
        frozen = replace(config, policy=replace(config.policy, adapter=None), recipe=stages[:number])
        run = experiment.start(frozen, "toy", tmp_path / str(number))
        learned = load_file(run / "tasks" / "02-right" / "model.safetensors")
        base = ToyPolicy.load(toy_checkpoint)
        moved = {name for name, weight in base.acting_weights().items() if not torch.equal(weight, learned[name])}
        assert moved == {name for stage in stages[:number] for name in base.groups[stage.learns[0]]}


def test_held_out_tasks_can_be_left_out_of_shifted_variants(config, tmp_path, no_report):
    tasks = replace(config.tasks, held_out=("up",))
    evaluation = replace(config.evaluation, variants=("id", "ood_val"), held_out="first", decoders=("greedy",))
    run = experiment.start(replace(config, tasks=tasks, evaluation=evaluation), "toy", tmp_path / "run")
    found = RunFolder.open(run).cells()
    of_variant = {v: {cell.task for cell in found if cell.variant == v} for v in ("id", "ood_val")}
    assert of_variant == {"id": {*config.tasks.trained, "up"}, "ood_val": {*config.tasks.trained}}
    assert read(run).finished
    assert read(run).matrices["ood_val", "greedy"].held_out == ()


def test_the_first_and_the_last_row_are_filmed(config, tmp_path, monkeypatch, no_report):
    filmed = []
    monkeypatch.setattr(experiment.video, "encode", lambda frames, target, fps: filmed.append((frames, target)))
    experiment.start(replace(config, evaluation=replace(config.evaluation, film=24)), "toy", tmp_path / "film")
    videos = tmp_path / "film" / "videos"
    assert [target for _, target in filmed] == [videos / row / f"{task}.mp4" for row in ("00", "02") for task in TASKS]
    assert all(frames.shape[1:] == (24, 24, 3) and len(frames) > 1 for frames, _ in filmed)


def test_a_run_without_learning_signal_says_so(config, tmp_path, capsys, no_report):
    tiny = replace(config, recipe=(GRPO(iterations=1, groups=1, group_size=2),))
    run = experiment.start(tiny, "toy", tmp_path / "tiny")
    assert [row["kept"] for row in lines(run / "metrics.jsonl")] == [0, 0]
    said = capsys.readouterr().out
    assert "No learning signal: the 2 episodes of left ended alike in every group, so nothing was learned." in said


def test_strategies_that_acted_without_a_learning_signal_are_not_called_nothing(
    config, tmp_path, monkeypatch, capsys, no_report
):
    monkeypatch.setattr(Strategies, "wants_all", lambda self: True)
    monkeypatch.setattr(Strategies, "batch_loss", lambda self, outputs, whole: outputs.log_prob.mean())
    tiny = replace(config, recipe=(GRPO(iterations=1, groups=1, group_size=2),), tasks=Tasks(("left",)))
    run = experiment.start(tiny, "toy", tmp_path / "tiny")
    (row,) = lines(run / "metrics.jsonl")
    assert (row["kept"], row["grad_norm"] > 0) == (0, True)
    said = capsys.readouterr().out
    assert "the 2 episodes of left ended alike in every group, so only the strategies acted." in said
    assert "nothing was learned" not in said


def test_nan_stops_the_run_with_its_last_good_state_committed(
    run, toy_checkpoint, tmp_path, monkeypatch, capsys, no_report
):
    calls = iter(range(10**6))
    healthy = GRPO.loss

    def spoilt(self, outputs):
        loss, figures = healthy(self, outputs)
        return (loss * float("nan") if next(calls) == 19 else loss), figures  # in the third of four iterations

    monkeypatch.setattr(GRPO, "loss", spoilt)
    broken = tmp_path / "broken"
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "toyhouse.preset", f"--run-dir={broken}", f"--policy.checkpoint={toy_checkpoint}"])
    assert stop.value.code == 3
    assert "became not-a-number (loss nan" in capsys.readouterr().err
    assert RunFolder.open(broken).latest().state["cursor"] == {"phase": 1, "stage": 0, "iteration": 0}
    monkeypatch.setattr(GRPO, "loss", healthy)
    experiment.resume(broken)
    assert essence(broken) == essence(run)


def test_ctrl_c_finishes_the_iteration_and_the_run_goes_on_later(toy_checkpoint, tmp_path, monkeypatch, no_report):
    """The world sends SIGINT to the run and its worker in the middle of the second task's second iteration."""
    monkeypatch.setenv("UNRELIABLE", str(tmp_path))
    arguments = [
        "--suite=toyhouse.unreliable",
        "--tasks.trained=works,interrupts-once",
        "--tasks.held_out=",
        "--recipe.grpo.iterations=3",
        f"--policy.checkpoint={toy_checkpoint}",
    ]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "perennial", "run", "toyhouse.preset", "--run-dir", str(stopped), *arguments]
    done = subprocess.run(
        [*command, "--workers.backend=process"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    _, asked, stopped_sentence = done.stderr.splitlines()
    assert asked.endswith("Press Ctrl-C again to stop at once.")
    assert stopped_sentence.startswith("perennial: Stopped with everything committed; continue by `perennial resume")
    assert RunFolder.open(stopped).latest().state["cursor"] == {"phase": 1, "stage": 0, "iteration": 2}
    experiment.resume(stopped)
    cli.main(["run", "toyhouse.preset", "--run-dir", str(whole), *arguments])
    assert essence(stopped) == essence(whole)
