"""Three Meta-World tasks in a row with LoRA and GRPO, about five minutes on two processor cores."""

from perennial.config import Config, Tasks
from perennial.suites.metaworld import MetaWorld

SEQUENCE = MetaWorld.sequences["demo"]

CONFIG = Config(
    tasks=Tasks(SEQUENCE.trained, SEQUENCE.held_out),
)
