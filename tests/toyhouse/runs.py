"""The toy checkpoint, a small configuration, and what two runs must have in common."""

import os
from dataclasses import replace
from pathlib import Path

from perennial.cli import main
from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies.lora import LoRA
from perennial.rollout.workers import WorkerConfig
from perennial.testing.toy import ToyPolicy

TOY = "perennial.testing.toy"

CONFIG = Config(
    description="two toy tasks and one held out",
    suite=TOY,
    tasks=Tasks(("left", "up"), ("down-right",)),
    policy=PolicyChoice(TOY, "none", LoRA(4, 4)),
    recipe=(GRPO(iterations=2, groups=4, group_size=4, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=1)),),
    evaluation=Evaluation(episodes=6, film=0),
    workers=WorkerConfig("inline", count=1, slots=8),
)


def toy_config(checkpoint: Path, **changes) -> Config:
    return replace(CONFIG, policy=replace(CONFIG.policy, checkpoint=str(checkpoint)), **changes)


def save_checkpoint(folder: Path) -> Path:
    ToyPolicy(0).save(folder)
    return folder


def essence(run: Path) -> dict[str, bytes]:
    """Every file that must not depend on when, where or in how many pieces a run was made."""
    newest = max((run / "commits").iterdir())
    files = [*newest.rglob("*"), *(run / "tasks").rglob("*"), *(run / "evaluations").rglob("*"), run / "metrics.jsonl"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


def command(arguments: list[str], environment: dict[str, str]) -> None:
    """The command line, as the target of a process."""
    os.environ.update(environment)
    main(arguments)
