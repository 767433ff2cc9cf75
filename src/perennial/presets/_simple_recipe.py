"""What the experiments of the simple recipe (arXiv 2603.11653) with a VLA of 7B parameters have in common.

Values are those of the paper's tables and its released configuration. Where they differ, this is the paper: its Adam
has eps 1e-5, their code never passes it on. Weight decay 0.01 is what their code ends up with; the paper is silent.
Evaluation samples at the temperature of training, as they do, and is greedy as well.
"""

from __future__ import annotations

from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies.lora import LoRA
from perennial.suites.base import Sequence

TEMPERATURE = 1.6


def simple_recipe(suite: str, tasks: Sequence, checkpoint: str, iterations: int) -> Config:
    """The tasks of a sequence in a row, and those that it holds out.

    Args:
        suite: name of the suite.
        tasks: of the suite.
        checkpoint: folder with the policy that starts.
        iterations: of GRPO for each task.
    """
    return Config(
        suite=suite,
        tasks=Tasks(tasks.trained, tasks.held_out),
        policy=PolicyChoice(checkpoint=checkpoint, adapter=LoRA(rank=32, alpha=32)),
        recipe=(
            GRPO(
                iterations=iterations,
                groups=128,
                group_size=8,
                initial_states=50,
                temperature=TEMPERATURE,
                clip_low=0.20,
                clip_high=0.28,
                epochs=1,
                minibatches=8,
                optimizer=AdamWConfig(
                    learning_rate=2e-5,
                    betas=(0.9, 0.999),
                    eps=1e-5,
                    weight_decay=0.01,
                    warmup_steps=0,
                    max_grad_norm=1.0,
                ),
            ),
        ),
        evaluation=Evaluation(episodes=320, temperature=TEMPERATURE, film=0),
    )
