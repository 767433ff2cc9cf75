"""The presets against the paper's tables (arXiv 2603.11653, section 4, Table 6) and its released configuration."""

import dataclasses

import pytest

from perennial import config

SEQUENCES = {
    "spatial": ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]),
    "object": ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4]),
    "long": ([3, 4, 5, 6, 7], [0, 1, 2, 8, 9]),
}
EPISODES_PER_TASK = {"spatial": 10_240, "object": 10_240, "long": 5_120}
RECIPE = {
    "groups": 128,
    "group_size": 8,
    "initial_states": 50,
    "temperature": 1.6,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "epochs": 1,
    "minibatches": 8,
}
OPTIMIZER = {
    "learning_rate": 2e-5,
    "betas": (0.9, 0.999),
    "eps": 1e-5,
    "weight_decay": 0.01,
    "warmup_steps": 0,
    "decay_steps": 0,
    "final_learning_rate": 0.0,
    "max_grad_norm": 1.0,
    "micro_batch": 32,
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_preset_is_what_the_paper_says(name, toy_checkpoint):
    preset = config.preset(f"simple_recipe_libero_{name}")
    trained, held_out = SEQUENCES[name]
    assert preset.suite == "libero_study"
    assert preset.tasks.trained == tuple(f"{name}-{i}" for i in trained)
    assert preset.tasks.held_out == tuple(f"{name}-{i}" for i in held_out)
    (stage,) = preset.recipe
    found = dataclasses.asdict(stage)
    assert {key: found[key] for key in RECIPE} == RECIPE
    assert found["optimizer"] == OPTIMIZER
    assert stage.iterations * stage.groups * stage.group_size == EPISODES_PER_TASK[name]
    assert (preset.policy.adapter.rank, preset.policy.adapter.alpha) == (32, 32)
    assert (preset.evaluation.episodes, preset.evaluation.temperature) == (320, 1.6)
    assert preset.strategies == ()
    choice = dataclasses.replace(preset.policy, checkpoint=str(toy_checkpoint))
    config.validate(dataclasses.replace(preset, policy=choice))
