"""The preset against RETAIN (arXiv 2512.08333) and what its independent reproduction and released code add."""

import dataclasses

import pytest

from perennial import config, overrides
from perennial.suites.libero_retain import LiberoRetain

OPTIMIZER = {
    "learning_rate": 2.5e-5,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 1e-10,
    "warmup_steps": 1_000,
    "decay_steps": 30_000,
    "final_learning_rate": 2.5e-6,
    "max_grad_norm": 1.0,
    "micro_batch": None,
}
TARGETS = [
    ("stove", {}, 500, 0.9),
    ("mug", {"tasks.trained": "long-4", "recipe.sft.iterations": "20", "strategies.retain.alpha": "0.8"}, 1_000, 0.8),
    ("basket", {"tasks.trained": "long-7"}, 500, 0.9),
]
"""A word of LIBERO's sentence, what is set for the target, its steps of task-FT, and its alpha."""


@pytest.mark.parametrize(("word", "changes", "steps", "alpha"), TARGETS)
def test_the_preset_is_what_the_paper_says(word, changes, steps, alpha, toy_checkpoint):
    folders = {"policy.checkpoint": str(toy_checkpoint), "recipe.sft.demonstrations": "nowhere"}
    preset = config.validate_settings(overrides.apply(config.preset("retain_libero"), changes | folders))
    (trained,) = preset.tasks.trained
    assert word in LiberoRetain().tasks[trained].evaluation_instruction
    assert len(preset.tasks.held_out) == 20
    (stage,) = preset.recipe
    assert (stage.iterations * stage.steps, stage.batch_size, stage.pretraining) == (steps, 64, "")
    assert dataclasses.asdict(stage.optimizer) == OPTIMIZER
    average, merge = preset.strategies
    assert (average.name, average.decay) == ("ema", 0.99)
    assert (merge.name, merge.alpha, merge.vision + merge.language + merge.action) == ("retain", (alpha,), ())
    assert (preset.policy.name, preset.policy.adapter, preset.seed) == ("pi0", None, 42)
    assert preset.evaluation.variants == ("id", "medium", "hard-0", "hard-1")
    assert (preset.evaluation.episodes, preset.evaluation.held_out) == (50, "first")
