"""RETAIN (arXiv 2512.08333) on Meta-World: few demonstrations of one task in a narrow setting, judged in wider ones."""

from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.optimizer import AdamWConfig
from perennial.learning.sft import SFT

GENERALIST = (
    "button-press-topdown-v3", "button-press-v3", "coffee-button-v3", "door-close-v3", "door-lock-v3",
    "drawer-close-v3", "drawer-open-v3", "faucet-close-v3", "handle-press-v3", "window-close-v3",
)  # fmt: skip
"""Tasks that the base can do, which are not taught again."""

CONFIG = Config(
    tasks=Tasks(("door-open-v3",), GENERALIST),
    policy=PolicyChoice(adapter=None),
    recipe=(
        SFT(
            iterations=10,
            steps=20,
            batch_size=64,
            optimizer=AdamWConfig(learning_rate=3e-4, warmup_steps=20, micro_batch=64),
        ),
    ),
    evaluation=Evaluation(
        episodes=20, decoders=("sampled",), variants=("id", "narrow", "ood_val", "ood_test"), held_out="first", film=0
    ),
)
