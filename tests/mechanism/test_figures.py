import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perennial import cli, experiment
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.learning.optimizer import AdamWConfig
from perennial.mechanism import command
from perennial.mechanism.figures import scope
from perennial.policies.lora import merged_weights
from perennial.rollout.workers import InlineWorkers
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.strategies.expansion import Expansion
from perennial.testing.toy import ToyPolicy, ToySuite
from toyhouse.runs import toy_config

TAUGHT, HELD_OUT = ("left", "right"), ("up-left",)
GROUPS = ("vision", "language", "action")


def start(config, folder):
    """A run without its report, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")
        return experiment.start(config, "toy", folder)


@pytest.fixture(scope="module")
def config(toy_checkpoint):
    config = toy_config(toy_checkpoint)
    eager = replace(config.recipe[0], iterations=2, optimizer=AdamWConfig(learning_rate=5e-2, warmup_steps=1))
    return replace(config, recipe=(eager,), evaluation=replace(config.evaluation, decoders=("sampled",)))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return start(config, tmp_path_factory.mktemp("runs") / "toy")


def measure(run, tmp_path, capsys, *options):
    capsys.readouterr()
    cli.main(["mechanism", str(run), "--json", "--episodes=6", "--out", str(tmp_path / "page.html"), *options])
    return json.loads(capsys.readouterr().out)


def learned(run, task):
    """Base and merged weights of a toy run after a task, with NumPy alone."""
    base = {name: value.detach().numpy() for name, value in ToyPolicy(0).model.named_parameters()}
    (folder,) = (run / "tasks").glob(f"*-{task}")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    after = dict(base)
    for key, a in adapter.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            b = adapter[key.replace("lora_A", "lora_B")]
            after[name] = base[name] + (b.double() @ a.double()).numpy()
    return base, after


def test_sizes_and_ranks_are_those_of_the_adapter(run, tmp_path, capsys):
    figures = measure(run, tmp_path, capsys, "--scales", "0")
    assert [row["after"] for row in figures["rows"]] == list(TAUGHT)
    assert figures["groups"] == list(GROUPS)
    for row in figures["rows"]:
        base, after = learned(run, row["after"])
        deltas = {name: after[name].astype(float) - base[name] for name in base}
        for group in GROUPS:
            names = ToyPolicy.groups[group]
            found = row["update"][group]
            norm = np.sqrt(sum((deltas[name] ** 2).sum() for name in names))
            size = np.sqrt(sum((base[name].astype(float) ** 2).sum() for name in names))
            nuclear = [np.linalg.norm(deltas[n], "nuc") for n in names if deltas[n].ndim == 2 and deltas[n].any()]
            assert found["frobenius"] == pytest.approx(norm, rel=1e-4)
            assert found["relative"] == pytest.approx(norm / size, rel=1e-4)
            assert found["matrices"] == len(nuclear)
            assert found["nuclear"] == pytest.approx(np.mean(nuclear), rel=1e-3)
            assert 1 <= found["rank"] <= 4 + 1e-6
        parts = [row["update"][group]["frobenius"] for group in GROUPS]
        assert row["update"]["all"]["frobenius"] == pytest.approx(np.linalg.norm(parts))
        energies = [row["fisher"][group]["energy"] for group in GROUPS]
        assert row["fisher"]["all"]["energy"] == pytest.approx(sum(energies))
        assert 0 < row["fisher"]["all"]["share"] < 1


def test_the_ends_of_the_scale_are_the_rows_of_the_success_matrix(run, tmp_path, capsys):
    figures = measure(run, tmp_path, capsys, "--scales", "1,0.5")
    assert [level["scale"] for level in figures["scales"]] == [0, 0.5, 1]
    cells = RunFolder.open(run).cells()
    different = 0
    for level, row in ((figures["scales"][0], 0), (figures["scales"][2], 2)):
        for task, rate in level["tasks"].items():
            successes = cells[Cell(row, "sampled", "id", task)].successes
            assert rate["value"] == pytest.approx(100 * np.mean(successes))
            assert rate["n"] == 6
            different += rate["value"] != figures["scales"][1]["tasks"][task]["value"]
        pooled = np.mean([level["tasks"][task]["value"] for task in TAUGHT])
        assert level["taught"]["value"] == pytest.approx(pooled)
        assert level["taught"]["n"] == 12
        assert level["held_out"] == level["tasks"]["up-left"]
    assert different


def test_the_weights_at_both_ends_are_exact(run, tmp_path, capsys, monkeypatch):
    """Bit for bit the base at 0 and the final policy at 1, and between them their line."""
    seen = []
    monkeypatch.setattr(InlineWorkers, "broadcast", lambda self, weights: seen.append(dict(weights)))
    measure(run, tmp_path, capsys, "--scales", "0,0.25,1")
    base = dict(ToyPolicy(0).model.named_parameters())
    final = final_weights(run)
    assert len(seen) == 1 + 3 * 3  # the workers begin with the base
    for scale, sent in zip((0, 0.25, 1), (seen[1], seen[4], seen[7]), strict=True):
        for name, weight in sent.items():
            exact = {0: base[name], 1: final[name]}.get(scale)
            if exact is not None:
                assert torch.equal(weight, exact)
            torch.testing.assert_close(weight, base[name] + scale * (final[name] - base[name]))


def final_weights(run):
    from perennial.evaluation.standalone import of_run

    return merged_weights(of_run(RunFolder.open(run), -1, 0).policy.model)


def test_divergences_are_those_of_the_bases_decisions(run, toy_checkpoint, tmp_path, capsys):
    """Played and summed up again here, decision by decision."""
    found = measure(run, tmp_path, capsys, "--scales", "0")
    policy = ToyPolicy.load(toy_checkpoint)
    after = ToyPolicy.load(toy_checkpoint)
    after.model.load_state_dict(final_weights(run))
    kl = found["rows"][-1]["kl"]
    for task in (*TAUGHT, *HELD_OUT):
        batch = decisions(policy, task, found["seed"])
        logits = [one.logits(batch).detach().double().numpy() for one in (policy, after)]
        p, q = (values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in logits)
        forward = (np.exp(p) * (p - q)).sum(-1)[batch.mask].mean()
        reverse = (np.exp(q) * (q - p)).sum(-1)[batch.mask].mean()
        assert kl["tasks"][task] == pytest.approx({"forward": forward, "reverse": reverse}, rel=1e-4)
        assert min(forward, reverse) > 0
    for key, tasks in (("taught", TAUGHT), ("held_out", HELD_OUT)):
        assert kl[key]["forward"] == pytest.approx(np.mean([kl["tasks"][task]["forward"] for task in tasks]))


def decisions(policy, task, seed):
    """All decisions of the base's six evaluation episodes; the tasks are short enough that none is left out."""
    from perennial.rollout.collect import Environments, play
    from perennial.rollout.trajectory import to_batch

    suite = ToySuite()
    episodes = [replace(e, keep=True) for e in evaluation_episodes(suite, task, "id", 6, 1.0)]
    batch = to_batch(play(policy, Environments(suite, 8), episodes, seed, 8), policy.token_steps)
    assert len(batch) <= 64
    return batch


def test_fisher_energy_is_that_of_the_base_on_the_chosen_tasks(run, toy_checkpoint, tmp_path, capsys):
    """F from the score of the bias of the head, which is one-hot minus probability."""
    policy = ToyPolicy.load(toy_checkpoint)
    batches = {task: decisions(policy, task, 0) for task in (*TAUGHT, *HELD_OUT)}
    base, after = learned(run, TAUGHT[-1])
    for options, tasks in (((), HELD_OUT), (("--tasks", *TAUGHT), TAUGHT)):
        figures = measure(run, tmp_path, capsys, "--scales", "0", *options)
        assert figures["fisher"] == list(tasks)
        fisher = np.mean([np_fisher(policy, batches[task]) for task in tasks], axis=0)
        delta = after["head.weight"].astype(float) - base["head.weight"]
        part = (fisher * delta**2).sum()
        energy = figures["rows"][-1]["fisher"]["action"]["energy"]
        others = action_energy_without_head(policy, batches, tasks, base, after)
        assert energy == pytest.approx(part + others, rel=1e-3)


def np_fisher(policy, batch):
    """Mean squared gradient of log pi by the weight of the head, from the closed form of a linear softmax layer."""
    total = 0.0
    for row in range(len(batch)):
        one = batch.take(np.array([row]))
        hidden = {}
        hook = policy.model.head.register_forward_hook(lambda m, i, o, h=hidden: h.update(x=i[0][0].detach().numpy()))
        logits = policy.logits(one)[0].detach().double().numpy()
        hook.remove()
        probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        score = (np.eye(logits.shape[-1])[one.sample[0]] - probability) * one.mask[0][:, None]
        total = total + np.outer(score.ravel(), hidden["x"]) ** 2
    return total / len(batch)


def action_energy_without_head(policy, batches, tasks, base, after):
    """The rest of the action group, by automatic differentiation of one decision at a time."""
    rest = [name for name in ToyPolicy.groups["action"] if name != "head.weight"]
    parameters = dict(policy.model.named_parameters())
    energy = 0.0
    for task in tasks:
        batch = batches[task]
        for row in range(len(batch)):
            one = batch.take(np.array([row]))
            total = (policy.log_prob(one) * torch.from_numpy(one.mask)).sum()
            gradients = torch.autograd.grad(total, [parameters[name] for name in rest], allow_unused=True)
            for name, gradient in zip(rest, gradients, strict=True):
                if gradient is not None:
                    delta = after[name].astype(float) - base[name]
                    energy += float((gradient.numpy() ** 2 * delta**2).sum()) / len(batch) / len(tasks)
    return energy


def test_every_parameter_may_have_learned(config, tmp_path, capsys):
    full = replace(config, policy=replace(config.policy, adapter=None), tasks=replace(config.tasks, held_out=()))
    figures = measure(start(full, tmp_path / "full"), tmp_path, capsys, "--scales", "0,1")
    assert figures["fisher"] == list(TAUGHT)
    assert figures["scales"][1]["held_out"] is None
    ranks = [row["update"]["action"]["rank"] for row in figures["rows"]]
    assert min(ranks) > 4  # more directions than the adapter of the other tests has
    assert "never taught" not in (tmp_path / "page.html").read_text(encoding="utf-8").casefold()


def test_the_strategy_chooses_what_is_scaled(config, tmp_path, capsys, monkeypatch):
    """With an adapter for each task and the base for the others, held-out tasks do not change at any scale."""
    run = start(replace(config, strategies=(Expansion(),)), tmp_path / "expansion")
    seen = []
    monkeypatch.setattr(InlineWorkers, "broadcast", lambda self, weights: seen.append(dict(weights)))
    figures = measure(run, tmp_path, capsys, "--scales", "0,1")
    left, right, untaught = (sent["head.weight"] for sent in seen[-3:])  # at scale 1
    base = ToyPolicy(0).model.head.weight
    assert torch.equal(untaught, base)
    assert not torch.equal(left, base)
    assert not torch.equal(left, right)
    first, second = (row["kl"]["tasks"] for row in figures["rows"])
    assert first["up-left"] == second["up-left"] == {"forward": 0, "reverse": 0}
    assert first["left"] == second["left"] != {"forward": 0, "reverse": 0}
    assert first["right"] == {"forward": 0, "reverse": 0} != second["right"]


def test_an_unfinished_run_is_measured_as_far_as_it_came(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (last,) = (copy / "tasks").glob("02-*")
    shutil.rmtree(last)
    figures = measure(copy, tmp_path, capsys, "--scales", "0,1")
    whole = measure(run, tmp_path, capsys, "--scales", "0,1")
    assert not figures["finished"]
    assert whole["finished"]
    assert figures["taught"] == ["left"]
    assert [row["update"] for row in figures["rows"]] == [row["update"] for row in whole["rows"][:1]]
    assert set(figures["scales"][1]["tasks"]) == {"left", "up-left"}


def test_a_policy_without_logits_has_no_divergence(run, tmp_path, capsys, monkeypatch):
    from perennial.policies.base import Policy

    monkeypatch.setattr(ToyPolicy, "log_prob", _log_prob)
    monkeypatch.setattr(ToyPolicy, "logits", Policy.logits)
    monkeypatch.setattr(ToyPolicy, "act", _act)
    figures = measure(run, tmp_path, capsys, "--scales", "0")
    assert [row["kl"] for row in figures["rows"]] == [None, None]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="fisher"' in page
    assert 'id="kl"' not in page


_act = ToyPolicy.act


def _log_prob(self, batch):
    log_probs = self._forward(batch.observation)[0].log_softmax(-1)
    return log_probs.gather(-1, torch.from_numpy(batch.sample)[..., None]).squeeze(-1)


def test_a_policy_without_probabilities_is_refused_before_anything_is_played(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ToyPolicy, "missing", {"log_prob": "it says one action"})
    monkeypatch.setattr("perennial.mechanism.figures.start_workers", None)
    with pytest.raises(SystemExit):
        measure(run, tmp_path, capsys)
    said = " ".join(capsys.readouterr().err.split())
    assert "does not have, as it says one action; measure a run of another policy." in said


def test_the_page_and_the_json_beside_it_and_the_tables_show_the_same(run, tmp_path, capsys):
    figures = measure(run, tmp_path, capsys)
    assert json.loads((tmp_path / "page.json").read_text()) == figures
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    cli.main(["mechanism", str(run), "--episodes=6"])
    shown = capsys.readouterr().out
    assert json.loads((run / "report" / "mechanism.json").read_text()) == figures
    assert (run / "report" / "mechanism.html").read_text(encoding="utf-8") == page
    assert page.count('class="plot"') == 5
    assert page.count('<td class="cell') == 5 * 3
    for row in figures["rows"]:
        for group in (*GROUPS, "all"):
            numbers = [row["update"][group]["rank"], row["fisher"][group]["energy"]]
            assert all(command.number(value) in page for value in numbers)
            assert all(command.number(value) in shown for value in numbers)
    last = figures["scales"][-1]["tasks"]["left"]
    assert f'<data value="{last["value"]}">' in page
    assert len(figures["scales"]) == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--scales=0,2", "--scales is '0,2', but it must be numbers from 0 to 1"),
        ("--scales=-0.1", "--scales is '-0.1', but it must be numbers from 0 to 1"),
        ("--scales=half", "--scales is 'half', but it must be numbers from 0 to 1"),
        ("--scales=nan", "--scales is 'nan', but it must be numbers from 0 to 1"),
        ("--scales=", "--scales is '', but it must be numbers from 0 to 1"),
        ("--episodes=0", "--episodes is 0, but it must be above 0"),
        ("--out=.", "--out is ., but it must be the file of a page"),
        ("--tasks=lefft", "There is no task that the run was taught or holds out 'lefft'. Did you mean left"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, option, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["mechanism", str(run), option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_has_learned_nothing_yet_is_refused(run, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(run / "run.json", new)
    with pytest.raises(PerennialError, match=r"has not learned a task yet; continue it by `perennial resume"):
        command.scope(new, ())
    with pytest.raises(PerennialError, match="is not a run folder"):
        command.scope(tmp_path, ())


def test_the_base_that_a_gate_keeps_is_no_task(run, tmp_path):
    gated = tmp_path / "gated"
    shutil.copytree(run, gated)
    shutil.copytree(gated / "tasks" / "01-left", gated / "tasks" / "00-base")
    assert scope(gated, ()).done == scope(run, ()).done == 2
