"""RETAIN (arXiv 2512.08333) on LIBERO: pi0 learns one long task from demonstrations, then is merged with what it was.

Task-FT of the stove, 500 steps, merged with 0.9 for the new weights. The other two targets are `--tasks.trained long-4
--recipe.sft.iterations 20 --strategies.retain.alpha 0.8` (mugs on plates, 1,000 steps) and `--tasks.trained long-7`
(items into the basket, 500 steps, 0.9). The coefficients are those that the paper chose in the variant "medium"; its
tests are "hard-0" and "hard-1". The average of the weights with 0.99 is from their code, as is the seed.

Differs from the paper in its evaluation: 50 episodes everywhere, where they have 20 in distribution and 10 for each of
the twenty tasks of the generalist. It starts from their generalist, which is not published, and learns from
demonstrations that `perennial demos` cannot make; name both by --policy.checkpoint and --recipe.sft.demonstrations. The
paper executes 5 of the 50 actions that pi0 decides: have `n_action_steps` 5 in the checkpoint's config.json.
"""

from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.optimizer import AdamWConfig
from perennial.learning.sft import SFT
from perennial.strategies.ema import EMA
from perennial.strategies.retain import Retain
from perennial.suites.libero_retain import GENERALIST

STOVE = "long-2"

CONFIG = Config(
    seed=42,
    suite="libero_retain",
    tasks=Tasks((STOVE,), GENERALIST),
    policy=PolicyChoice(name="pi0", checkpoint="pi0-libero-generalist", adapter=None),
    recipe=(
        SFT(
            iterations=10,
            steps=50,
            batch_size=64,
            optimizer=AdamWConfig(
                learning_rate=2.5e-5,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=1e-10,
                warmup_steps=1_000,
                decay_steps=30_000,
                final_learning_rate=2.5e-6,
                max_grad_norm=1.0,
            ),
        ),
    ),
    strategies=(EMA(decay=0.99), Retain(alpha=(0.9,))),
    evaluation=Evaluation(
        episodes=50, decoders=("sampled",), variants=("id", "medium", "hard-0", "hard-1"), held_out="first", film=0
    ),
)
