"""Whole toy runs through the gate: what harms is scaled down or undone, what does not is carried on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perennial import experiment, gating
from perennial.evaluation.gate import Gate
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies._learned import learned_weights, read_learned_weights, save_learned
from perennial.policies.base import Batch, Observation
from perennial.policies.lora import LoRA, add_adapter
from perennial.reports import page, summary
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.strategies._weights import between, snapshot
from perennial.strategies.composition import Strategies
from perennial.testing.toy import STEP, ToyPolicy, ToySuite
from toyhouse.harmful import Harmful
from toyhouse.runs import essence, toy_config

GATE = Gate(max_forgetting=10, pairs=120, held_out=1)
GENTLE = GRPO(iterations=1, groups=2, group_size=4, optimizer=AdamWConfig(learning_rate=1e-6, warmup_steps=1))


@pytest.fixture(scope="module")
def able(tmp_path_factory):
    """A base checkpoint that has been taught to go left, and up and left, by its own expert."""
    policy, rng = ToyPolicy(0), np.random.default_rng(0)
    tasks = [ToySuite.tasks[name] for name in ("left", "up-left")]
    states = rng.uniform(-1, 1, (512, 2)).astype(np.float32)
    told = [tasks[i % 2] for i in range(512)]
    words = [(*task.instructions, task.evaluation_instruction)[i // 2 % 3] for i, task in enumerate(told)]
    targets = np.array([ToySuite.targets[task.name] for task in told], np.float32)
    first = np.clip((targets - states) / STEP, -1, 1)
    second = np.clip((targets - states) / STEP - first, -1, 1)
    images = np.full((512, 1, 8, 8, 3), 20, np.uint8)
    sample = policy.encode(np.stack([first, second], 1))
    batch = Batch(Observation(images, tuple(words), states), sample, np.ones((512, 4), bool))
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        policy.imitation_loss(batch).mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("able") / "checkpoint"
    policy.save(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")


def config(able, **changes):
    made = toy_config(able, recipe=(GENTLE,), gate=GATE)
    return replace(made, evaluation=replace(made.evaluation, episodes=20, decoders=("sampled",)), **changes)


def gates(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "gate"]


def successes(run, row, task):
    return RunFolder.open(run).cell(Cell(row, "sampled", "id", task)).successes


@pytest.mark.parametrize("adapter", [LoRA(4, 4), None])
def test_an_update_that_destroys_is_undone_to_the_bit(able, tmp_path, capsys, monkeypatch, adapter):
    remembered, threads = [], []

    def remember(self, task, policy, collect):
        remembered.append(snapshot(policy))
        threads.append(torch.get_num_threads())

    monkeypatch.setattr(Strategies, "remember", remember)
    harmed = config(able, strategies=(Harmful(strength=30.0),), threads=2)
    harmed = replace(harmed, policy=replace(harmed.policy, adapter=adapter))
    run = experiment.start(harmed, "toy", tmp_path / "gated")
    first, second = gates(run)
    assert (first["kept"], second["kept"]) == (1, 0)
    assert [trial["scale"] for trial in second["trials"]] == [1, 0.75, 0.5, 0.25]
    assert all(trial["shown"] and trial["pairs"] <= 96 and trial["low"] > 10 for trial in second["trials"])
    file = "model.safetensors" if adapter is None else "adapter/adapter_model.safetensors"
    before, after = (load_file(run / "tasks" / name / file) for name in ("01-left", "02-right"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Strategies remember what is carried on, nothing of what was turned down, with the threads that learn.
    assert threads == [2, 2]
    assert all(torch.equal(remembered[0][name], remembered[1][name]) for name in remembered[0])
    assert successes(run, 2, "left") == successes(run, 1, "left")
    assert "Gate after right: rolled the update back" in capsys.readouterr().out.replace("\n", " ")
    open_gate = experiment.start(replace(harmed, gate=Gate()), "toy", tmp_path / "open")
    assert gates(open_gate) == []
    assert sum(successes(open_gate, 2, "up-left")) < 10 < sum(successes(run, 2, "up-left"))
    assert not (open_gate / "tasks" / "00-base").exists()


def test_an_update_that_harms_is_scaled_until_it_does_not(able, tmp_path):
    harmed = config(able, strategies=(Harmful(strength=1.0),))
    run = experiment.start(harmed, "toy", tmp_path / "gated")
    second = gates(run)[1]
    assert 0 < second["kept"] < 1
    assert [trial["passed"] for trial in second["trials"]] == [False] * (len(second["trials"]) - 1) + [True]
    assert second["trials"][-1]["drop"] <= 10 < second["trials"][0]["drop"]
    # What was carried on is that scale of the update, as the strategy left it.
    policy = ToyPolicy.load(able)
    add_adapter(policy, LoRA(4, 4), 0)
    before = read_learned_weights(policy, run / "tasks" / "01-left")
    carried_on = read_learned_weights(policy, run / "tasks" / "02-right")
    whole = experiment.start(replace(harmed, gate=Gate()), "toy", tmp_path / "open")
    update = read_learned_weights(policy, whole / "tasks" / "02-right")
    expected = between(before, update, lambda _: second["kept"])
    assert all(torch.equal(carried_on[name], expected[name]) for name in expected)
    kept, lost = (sum(sum(successes(r, 2, task)) for task in ("left", "up-left")) for r in (run, whole))
    assert kept > lost


def test_what_forgets_nothing_passes_with_few_episodes(able, tmp_path):
    run = experiment.start(config(able), "toy", tmp_path / "gentle")
    first, second = gates(run)
    for row, guarded in ((first, ["up-left"]), (second, ["left", "up-left"])):
        (trial,) = row["trials"]
        assert (row["kept"], trial["scale"], trial["passed"], trial["shown"]) == (1, 1, True, True)
        assert trial["pairs"] <= 64
        assert list(trial["drops"]) == guarded
    ungated = experiment.start(replace(config(able), gate=Gate()), "toy", tmp_path / "open")
    same = essence(ungated)
    assert {name: content for name, content in essence(run).items() if name in same and name != "metrics.jsonl"} == {
        name: content for name, content in same.items() if name != "metrics.jsonl"
    }


def test_a_learner_that_plays_itself_is_judged_as_its_copy_is(able, tmp_path):
    gate = Gate(max_forgetting=10, pairs=8, held_out=1)
    found = []
    for backend in ("inline", "shared"):
        made = config(able, strategies=(Harmful(),), gate=gate)
        policy, workers = replace(made.policy, adapter=None), replace(made.workers, backend=backend)
        found.append(
            essence(experiment.start(replace(made, policy=policy, workers=workers), "toy", tmp_path / backend))
        )
    assert found[0] == found[1]


def test_the_report_shows_every_trial(able, tmp_path, capsys, monkeypatch):
    run = experiment.start(config(able, strategies=(Harmful(strength=30.0),)), "toy", tmp_path / "run")
    told = summary.report_json(run)["gates"]
    assert [(row["task"], row["kept"]) for row in told] == [("left", 1), ("right", 0)]
    text = page.render(run)
    assert text.count('data-gate="1"') == 1
    assert text.count('data-gate="2"') == 4
    assert f'<data value="{told[1]["trials"][0]["drop"]}">' in text
    assert "rolled back to the weights before" in text
    assert "and of up-left" in text


def test_gate_episodes_are_neither_trained_on_nor_reported(able):
    made = config(able)
    tasks = [ToySuite.tasks[name] for name in made.guarded(1)]
    episodes = gating._episodes(made, 1, tasks, range(3))
    assert [e.task for e in episodes] == ["left", "up-left"] * 3
    assert {e.split for e in episodes} == {"training"}
    assert min(e.initial_state for e in episodes) >= gating.STATES > GRPO().initial_states
    assert not any(e.instruction == ToySuite.tasks[e.task].evaluation_instruction for e in episodes)
    other = gating._episodes(made, 0, tasks, range(3))
    assert not {(e.task, e.initial_state) for e in episodes} & {(e.task, e.initial_state) for e in other}


def test_where_states_are_finite_no_evidence_is_counted_twice(able, tmp_path):
    gate = Gate(max_forgetting=60, max_task_forgetting=90, held_out=1)
    run = experiment.start(config(able, suite="toyhouse.finite", gate=gate), "toy", tmp_path / "finite")
    assert [row["trials"][0]["pairs"] for row in gates(run)] == [4, 8]
    episodes = gating._episodes(config(able), 1, [ToySuite.tasks["left"]], range(4))
    assert len({e.initial_state % 4 for e in episodes}) == 4


@pytest.mark.parametrize("adapter", [LoRA(4, 4), None])
def test_learned_weights_come_back_to_the_bit(tmp_path, adapter):
    policy = ToyPolicy(3)
    if adapter:
        add_adapter(policy, adapter, 0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 1
    save_learned(policy, tmp_path, "base")
    kept, found = learned_weights(policy), read_learned_weights(policy, tmp_path)
    assert kept.keys() == found.keys() == policy.trainable().keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
