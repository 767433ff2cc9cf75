"""The study of the simple recipe (arXiv 2603.11653) on ManiSkill: four tasks "put ... on plate", four held out.

OpenVLA decides single steps here, so 1,024 episodes of 80 steps are 81,920 decisions, ten batches of the paper's 8,192.
The paper takes all other values unchanged from its LIBERO experiments. What it does not print is from elsewhere:
temperatures from the only released ManiSkill configuration, the 160 initial states and 10,240 episodes a task from a
re-implementation that cites the appendix; 320 evaluation episodes are those of LIBERO.

It cannot be run as it stands: the suite lacks the scene of these tasks. It starts from OpenVLA after their warm-up,
gen-robot/openvla-7b-rlvla-warmup; name its folder by --policy.checkpoint.
"""

from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies.lora import LoRA
from perennial.suites.maniskill import ManiSkill

SEQUENCE = ManiSkill.sequences["on_plate"]

CONFIG = Config(
    description="The simple recipe on ManiSkill, put things on a plate, with the hyper-parameters of the paper",
    suite="maniskill",
    tasks=Tasks(SEQUENCE.trained, SEQUENCE.held_out),
    policy=PolicyChoice(name="openvla", checkpoint="openvla-7b-rlvla-warmup", adapter=LoRA(rank=32, alpha=32)),
    recipe=(
        GRPO(
            iterations=10,
            groups=128,
            group_size=8,
            initial_states=160,
            temperature=1.0,
            clip_low=0.20,
            clip_high=0.28,
            epochs=1,
            minibatches=10,
            optimizer=AdamWConfig(
                learning_rate=2e-5,
                betas=(0.9, 0.999),
                eps=1e-5,
                weight_decay=0.01,
                warmup_steps=0,
                max_grad_norm=1.0,
                micro_batch=32,
            ),
        ),
    ),
    evaluation=Evaluation(episodes=320, temperature=0.6, film=0),
)
