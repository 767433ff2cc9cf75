"""The preset against the paper's tables (arXiv 2603.11653, section 4, Table 6, appendices D and H)."""

import dataclasses

import pytest

from perennial import config
from perennial.errors import PerennialError
from presets.test_simple_recipe import OPTIMIZER

TAUGHT = ("put carrot on plate", "put bread on plate", "put ketchup bottle on plate", "put fast food cup on plate")
HELD_OUT = ("put watering can on plate", "put pipe on plate", "put toy bear on plate", "put hamburger on plate")
HORIZON = 80
EPISODES_PER_TASK = 10_240
BATCH = 8_192
RECIPE = {
    "groups": 128,
    "group_size": 8,
    "initial_states": 40 * 4,
    "temperature": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "epochs": 1,
}


def test_the_preset_is_what_the_paper_says(toy_checkpoint, monkeypatch):
    from perennial.suites.maniskill_study import ManiSkillStudy

    preset = config.preset("simple_recipe_maniskill")
    tasks = ManiSkillStudy().tasks
    assert preset.suite == "maniskill_study"
    assert tuple(tasks[name].evaluation_instruction for name in preset.tasks.trained) == TAUGHT
    assert tuple(tasks[name].evaluation_instruction for name in preset.tasks.held_out) == HELD_OUT
    assert {tasks[name].horizon for name in preset.tasks.trained + preset.tasks.held_out} == {HORIZON}
    (stage,) = preset.recipe
    found = dataclasses.asdict(stage)
    assert {key: found[key] for key in RECIPE} == RECIPE
    assert found["optimizer"] == OPTIMIZER
    episodes = stage.groups * stage.group_size
    assert stage.iterations * episodes == EPISODES_PER_TASK
    assert episodes * HORIZON == stage.minibatches * BATCH
    assert preset.policy.name == "openvla"
    assert (preset.policy.adapter.rank, preset.policy.adapter.alpha) == (32, 32)
    assert (preset.evaluation.episodes, preset.evaluation.temperature) == (320, 0.6)
    assert preset.strategies == ()
    choice = dataclasses.replace(preset.policy, checkpoint=str(toy_checkpoint))
    ready = config.validate_settings(dataclasses.replace(preset, policy=choice))
    monkeypatch.delenv("PERENNIAL_PLATE_ASSETS", raising=False)
    with pytest.raises(
        PerennialError, match=r"git clone .*RL4VLA` and set PERENNIAL_PLATE_ASSETS"
    ):  # before anything is loaded
        config.validate(ready)
