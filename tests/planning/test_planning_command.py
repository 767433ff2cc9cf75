"""What `perennial plan` prints, and the refusal of a run that does not fit."""

import json
import re
from dataclasses import replace

import pytest
import torch

from perennial import cli, discovery
from perennial.config import PolicyChoice, preset
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.learning.sft import SFT
from perennial.planning.check import check_memory
from perennial.planning.reading import option, read_anatomy
from perennial.planning.work import work_of
from perennial.policies import _anatomy
from perennial.policies.base import Policy
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.suites.metaworld import MetaWorld
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint

DEMO = preset("demo")


def plan(capsys, *arguments):
    cli.main(["plan", *arguments])
    return capsys.readouterr().out


def test_a_run_of_the_bundled_policy_is_counted_from_its_own_files(capsys):
    found = json.loads(plan(capsys, "demo", "--json", "--recipe.grpo.optimizer.micro_batch", "256"))
    policy = OpenVLAOFT.load(read_anatomy(DEMO)[0])
    assert found["parameters"] == sum(p.numel() for p in policy.model.parameters())
    memory = found["memory"]
    assert memory["weights"] == 4 * found["parameters"]
    assert memory["adapter"] == 4 * found["adapter_parameters"]
    lasting = memory["weights"] + memory["adapter"] + memory["moments"] + memory["actors"]
    assert memory["peak"] == lasting + memory["gradients"] + memory["kept"] + memory["passing"]


def test_the_published_model_is_planned_without_its_weights_and_without_a_gpu(capsys):
    rows = ("--recipe.grpo.optimizer.micro_batch", "32")
    out = plan(capsys, "simple_recipe_libero_spatial", "--policy.dtype", "bfloat16", "--policy.device", "cuda", *rows)
    assert "7.37 billion parameters, an adapter of 111.4 million learns" in out
    assert re.search(r"RTX 3090 24 GB .* with \(1\)", out)
    assert re.search(r"A100 80 GB .* with \(2\)", out)
    assert "(2) --workers.backend shared --recipe.grpo.optimizer.micro_batch 16\n" in out


def test_the_workers_that_a_plan_counts_on_are_named(capsys, monkeypatch):
    monkeypatch.setattr("perennial.machine.cores", lambda: 3)
    monkeypatch.setattr("perennial.machine.free_memory", lambda: 10**12)
    for arguments, said, count in (
        ((), "Assumed: 3 workers, as this machine would take; set --workers.count; 40%", 3),
        (("--workers.count", "1"), "Assumed: 1 worker; 40%", 1),
        (("--workers.backend", "inline"), "Assumed: one process acts; 40%", 1),
    ):
        assert said in " ".join(plan(capsys, "demo", *arguments).split())
        assert json.loads(plan(capsys, "demo", "--json", *arguments))["workers"] == count


def test_where_a_strategy_chooses_what_acts_its_weights_are_copies(capsys):
    rows = ("--recipe.grpo.optimizer.micro_batch", "32", "--strategies", "expansion")
    out = plan(capsys, "simple_recipe_libero_spatial", "--policy.dtype", "bfloat16", "--policy.device", "cuda", *rows)
    assert re.search(r"RTX 3090 24 GB .* no ", out)
    assert "--workers.backend inline --recipe.grpo.optimizer.micro_batch 8\n" in out
    assert "shared" not in out


def test_work_is_the_episodes_that_are_played():
    config = replace(DEMO, recipe=(GRPO(iterations=3, groups=4, group_size=2, epochs=5),))
    suite, steps = MetaWorld(), 7
    learned = [suite.tasks[name].horizon for name in config.tasks.trained]
    found = work_of(config, steps)
    assert found.decisions == 3 * 8 * sum(-(-horizon // steps) for horizon in learned)
    assert found.rows == (5 * found.decisions,)
    shown = [*config.tasks.trained, *config.tasks.held_out]
    games = [len(evaluation_episodes(suite, n, "id", config.evaluation.episodes, 1.0)) for n in shown]
    rows = (len(learned) + 1) * len(config.evaluation.decoders)
    evaluated = rows * sum(n * suite.tasks[name].horizon for n, name in zip(games, shown, strict=True))
    assert found.env_steps == 3 * 8 * sum(learned) + evaluated
    imitated = work_of(replace(config, recipe=(SFT(iterations=2, steps=7, batch_size=3),)), steps)
    assert (imitated.decisions, imitated.rows) == (0, (2 * 7 * 3 * len(learned),))


@pytest.mark.parametrize("arguments", [("--share", "0"), ("--share", "1.5"), ("--steps-per-second", "-1")])
def test_assumptions_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        plan(capsys, "demo", *arguments)
    assert "a share is above 0 and at most 1" in capsys.readouterr().err


def test_a_policy_that_says_nothing_of_its_network_cannot_be_planned():
    config = replace(DEMO, policy=PolicyChoice(name="perennial.testing.toy"))
    with pytest.raises(PerennialError, match="does not describe its network"):
        read_anatomy(config)
    check_memory(config, room=0)


def test_demonstrations_need_not_be_recorded_to_plan(capsys):
    cli.main(["plan", "retain_metaworld", "--json"])
    assert json.loads(capsys.readouterr().out)["work"]["rows"][0] > 0


def test_switches_of_every_stage_are_named():
    config = replace(DEMO, recipe=(GRPO(), SFT()))
    name = "--recipe.{}.optimizer.micro_batch"
    switch = f"{name.format('*')} 3"
    assert option(config, switch) == f"{name.format('grpo')} 3 {name.format('sft')} 3"
    config = replace(DEMO, recipe=(GRPO(), SFT(optimizer=AdamWConfig(micro_batch=2))))
    assert option(config, switch) == f"{name.format('grpo')} 3"
    assert option(config, "--workers.slots 2") == "--workers.slots 2"


def test_programs_and_people_are_told_the_same(capsys):
    """On every GPU: the switches as they are typed, and times with these switches turned."""
    micro_batch = "--recipe.grpo.optimizer.micro_batch"
    arguments = ("simple_recipe_libero_spatial", "--policy.device", "cuda", micro_batch, "32")
    out, found = plan(capsys, *arguments), json.loads(plan(capsys, *arguments, "--json"))["gpus"]
    assert found["RTX 3090 24 GB"]["switches"][0] == "--workers.backend shared"
    (line,) = re.findall(r"A100 80 GB .* with \((\d)\) ", out)
    told = found["A100 80 GB"]
    assert f"({line}) {' '.join(told['switches'])}\n" in out
    changes = dict(zip(*[iter(" ".join(told["switches"]).split())] * 2, strict=True))
    assert int(changes[micro_batch]) == told["micro_batch"]
    turned = [text for pair in changes.items() for text in pair]
    again = json.loads(plan(capsys, *arguments[:3], *turned, "--json"))["gpus"]["A100 80 GB"]
    assert again == told | {"switches": []}


def test_an_open_micro_batch_is_no_switch_but_what_fits(capsys):
    arguments = ("simple_recipe_libero_spatial", "--policy.dtype", "bfloat16", "--workers.backend", "inline")
    found = json.loads(plan(capsys, *arguments, "--json"))["gpus"]
    for name in ("A100 80 GB", "H200 141 GB"):
        assert found[name]["switches"] == []
        rows = found[name]["micro_batch"]
        for tried, fits in ((rows, True), (2 * rows, False)):
            text = plan(capsys, *arguments, "--recipe.grpo.optimizer.micro_batch", str(tried), "--json")
            assert (json.loads(text)["gpus"][name]["switches"] == []) is fits


def test_an_absent_checkpoint_is_planned_in_the_type_that_it_would_be_loaded_in(tmp_path, capsys):
    write_openvla_checkpoint(tmp_path / "openvla", dtype=torch.bfloat16)
    assert OpenVLA.load(tmp_path / "openvla").model.projector.fc1.weight.dtype == torch.float32
    for name in ("openvla", "openvla_oft", "pi0"):
        anatomy = discovery.find("policies", name, Policy).anatomy(None, "push")
        found = json.loads(plan(capsys, "demo", "--policy.name", name, "--policy.checkpoint", "nowhere", "--json"))
        assert found["memory"]["weights"] == 4 * _anatomy.parameters(anatomy)
