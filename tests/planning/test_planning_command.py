"""What `perennial plan` prints, and the refusal of a run that does not fit."""

import json
import re
from dataclasses import replace

import pytest

from perennial import cli, overrides
from perennial.config import PolicyChoice, preset
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.learning.sft import SFT
from perennial.planning import estimate
from perennial.planning.check import check_memory
from perennial.planning.reading import option, read_anatomy, use_of
from perennial.planning.work import work_of
from perennial.policies.lora import LoRA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.rollout.workers import WorkerConfig
from perennial.suites.metaworld import MetaWorld

DEMO = preset("demo")


def plan(capsys, *arguments):
    cli.main(["plan", *arguments])
    return capsys.readouterr().out


def test_a_run_of_the_bundled_policy_is_counted_from_its_own_files(capsys):
    found = json.loads(plan(capsys, "demo", "--json"))
    policy = OpenVLAOFT.load(read_anatomy(DEMO)[0])
    assert found["parameters"] == sum(p.numel() for p in policy.model.parameters())
    memory = found["memory"]
    assert memory["weights"] == 4 * found["parameters"]
    assert memory["adapter"] == 4 * found["adapter_parameters"]
    lasting = memory["weights"] + memory["adapter"] + memory["moments"] + memory["actors"]
    assert memory["peak"] == lasting + memory["gradients"] + memory["kept"] + memory["passing"]


def test_the_published_model_is_planned_without_its_weights_and_without_a_gpu(capsys):
    out = plan(capsys, "simple_recipe_libero_spatial", "--policy.dtype", "bfloat16", "--policy.device", "cuda")
    assert "7.37 billion parameters, an adapter of 111.4 million learns" in out
    assert re.search(r"RTX 3090 24 GB .* no ", out)
    assert re.search(r"A100 80 GB .* with \(2\)", out)
    assert "(2) --workers.backend inline --recipe.grpo.optimizer.micro_batch 8\n" in out


def test_work_is_the_episodes_that_are_played():
    config = replace(DEMO, recipe=(GRPO(iterations=3, groups=4, group_size=2, epochs=5),))
    suite, steps = MetaWorld(), 7
    learned = [suite.tasks[name].horizon for name in config.tasks.trained]
    found = work_of(config, steps)
    assert found.decisions == 3 * 8 * sum(-(-horizon // steps) for horizon in learned)
    assert found.rows == 5 * found.decisions
    shown = [*config.tasks.trained, *config.tasks.held_out]
    games = [len(evaluation_episodes(suite.tasks[n], "id", config.evaluation.episodes, 1.0)) for n in shown]
    rows = (len(learned) + 1) * len(config.evaluation.decoders)
    evaluated = rows * sum(n * suite.tasks[name].horizon for n, name in zip(games, shown, strict=True))
    assert found.env_steps == 3 * 8 * sum(learned) + evaluated
    imitated = work_of(replace(config, recipe=(SFT(iterations=2, steps=7, batch_size=3),)), steps)
    assert (imitated.decisions, imitated.rows) == (0, 2 * 7 * 3 * len(learned))


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


def test_what_does_not_fit_is_refused_with_what_would_fit():
    published = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="float32")
    config = replace(DEMO, policy=published, recipe=(GRPO(), SFT()))
    with pytest.raises(
        PerennialError, match=r"needs .* GB of memory on cpu, but 60 GB are free; it fits with "
    ) as error:
        check_memory(config, room=60e9)
    changes = dict(re.findall(r"--(\S+) (\w+)", str(error.value)))
    assert "recipe.grpo.optimizer.micro_batch" in changes
    assert changes["recipe.grpo.optimizer.micro_batch"] == changes["recipe.sft.optimizer.micro_batch"]
    lighter = overrides.apply(config, changes)
    _, anatomy = read_anatomy(lighter)
    assert estimate.memory(use_of(lighter, anatomy, on_cpu=True)).peak < 60e9
    check_memory(lighter, room=60e9)
    with pytest.raises(PerennialError, match=r"but 20 GB are free, and no switch brings it below 4\d"):
        check_memory(config, room=20e9)


def test_a_run_with_every_switch_turned_is_still_refused_in_a_sentence():
    light = PolicyChoice(checkpoint="nowhere", dtype="bfloat16", checkpointing=True)
    least = (GRPO(optimizer=AdamWConfig(micro_batch=1)),)
    config = replace(DEMO, policy=light, recipe=least, workers=WorkerConfig(backend="inline", slots=1))
    with pytest.raises(PerennialError, match=r"but 1 GB are free, and no switch brings it below"):
        check_memory(config, room=1e9)


def test_demonstrations_need_not_be_recorded_to_plan(capsys):
    cli.main(["plan", "retain_metaworld", "--json"])
    assert json.loads(capsys.readouterr().out)["work"]["rows"] > 0


def test_switches_of_every_stage_are_named():
    config = replace(DEMO, recipe=(GRPO(), SFT()))
    assert option(config, "--a.*.b 3") == "--a.grpo.b 3 --a.sft.b 3"
    assert option(config, "--workers.slots 2") == "--workers.slots 2"
