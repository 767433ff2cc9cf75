"""The study of the simple recipe (arXiv 2603.11653) on ManiSkill: four tasks "put ... on plate", four held out.

OpenVLA decides single steps here, so 1,024 episodes of 80 steps are 81,920 decisions, ten batches of the paper's 8,192.
The paper takes all other values unchanged from its LIBERO experiments. What it does not print is from elsewhere:
temperatures from the only released ManiSkill configuration, the 160 initial states and 10,240 episodes a task from a
re-implementation that cites the appendix; 320 evaluation episodes are those of LIBERO.

It starts from OpenVLA after their warm-up, `hf download gen-robot/openvla-7b-rlvla-warmup`.
"""

from dataclasses import replace

from perennial.learning.grpo import GRPO
from perennial.presets._simple_recipe import simple_recipe
from perennial.suites.maniskill_study import ManiSkillStudy

LIKE_LIBERO = simple_recipe(
    "maniskill_study",
    ManiSkillStudy.sequences["simple_recipe"],
    "hub:gen-robot/openvla-7b-rlvla-warmup",
    iterations=10,
)
(GRPO_LIKE_LIBERO,) = LIKE_LIBERO.recipe
assert isinstance(GRPO_LIKE_LIBERO, GRPO)

CONFIG = replace(
    LIKE_LIBERO,
    policy=replace(LIKE_LIBERO.policy, name="openvla"),
    recipe=(replace(GRPO_LIKE_LIBERO, initial_states=160, temperature=1.0, minibatches=10),),
    evaluation=replace(LIKE_LIBERO.evaluation, temperature=0.6),
)
