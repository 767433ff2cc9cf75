"""Three Meta-World tasks in a row with LoRA and GRPO, about eight minutes on two processor cores."""

from perennial.config import Config, Evaluation, Tasks

CONFIG = Config(
    description="Three Meta-World tasks in a row with LoRA and GRPO",
    tasks=Tasks(
        trained=("handle-press-v3", "faucet-open-v3", "drawer-open-v3"),
        held_out=("window-open-v3", "door-open-v3", "coffee-button-v3"),
    ),
    evaluation=Evaluation(episodes=40),
)
