"""The toy checkpoint, a small configuration, and what two runs must have in common."""

import os
from dataclasses import replace
from pathlib import Path

from perennial import experiment
from perennial.cli import main
from perennial.config import Config, Evaluation, PolicyChoice, Tasks
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies.lora import LoRA
from perennial.rollout.workers import WorkerConfig

TOY = "perennial.testing.toy"

CONFIG = Config(
    suite=TOY,
    tasks=Tasks(("left", "right"), ("up-left",)),
    policy=PolicyChoice(TOY, "none", LoRA(4, 4)),
    recipe=(GRPO(iterations=2, groups=4, group_size=8, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=1)),),
    evaluation=Evaluation(episodes=6, film=0),
    workers=WorkerConfig("inline", count=1, slots=8),
    threads=1,
)


def toy_config(checkpoint: Path, **changes) -> Config:
    return replace(CONFIG, policy=replace(CONFIG.policy, checkpoint=str(checkpoint)), **changes)


def essence(run: Path) -> dict[str, bytes]:
    """The files of a run that must not depend on when, where or in how many pieces it was made.

    Only `state.json` of the newest commit, and so its manifest, tell how long the timings are.
    """
    newest = max((run / "commits").iterdir())
    folders = (newest, run / "tasks", run / "evaluations")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    told = {newest / "state.json", newest / "manifest.json"}
    return {
        str(path.relative_to(run)): path.read_bytes() for path in (*files, run / "metrics.jsonl") if path not in told
    }


def snapshot(folder: Path) -> dict[Path, bytes]:
    """All files of a run but its report and its lock."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "report" not in path.parts and path.name != ".lock"
    }


def command(arguments: list[str], environment: dict[str, str]) -> None:
    """The command line, as the target of a process; it writes no report, which would take most of the time."""
    os.environ.update(environment)
    experiment.page.write = lambda path: path / "report" / "index.html"
    main(arguments)
