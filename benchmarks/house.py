"""What a run costs besides acting and learning: commits, start-up, memory."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perennial import discovery
from perennial.config import Config
from perennial.learning.optimizer import build_optimizer
from perennial.policies._learned import save_learned
from perennial.policies.base import Policy
from perennial.policies.lora import add_adapter
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.storage.run_folder import RunFolder
from perennial.storage.tensors import save_optimizer
from perennial.strategies.composition import Strategies

Result = dict[str, float | str]


def measure(config: Config, repeats: int) -> Result:
    """Medians over `repeats`."""
    return {
        "commit_ms": 1000 * _commit(config, repeats),
        "cli_help_seconds": _wall([sys.executable, "-m", "perennial", "--help"], repeats),
        "python_start_seconds": _wall([sys.executable, "-c", "pass"], repeats),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _commit(config: Config, repeats: int) -> float:
    """Seconds of one atomic commit of adapter and optimiser."""
    policy = discovery.find("policies", config.policy.name, Policy).load(checkpoint_folder(config.policy.checkpoint))
    assert config.policy.adapter is not None
    add_adapter(policy, config.policy.adapter, config.seed)
    optimizer = build_optimizer(policy, Strategies(), config.recipe[0].optimizer)
    for parameter in policy.trainable().values():
        parameter.grad = parameter.detach().clone()
    optimizer.step()

    def write(target: Path) -> None:
        save_learned(policy, target, "bench")
        save_optimizer(optimizer, policy.trainable(), target / "optimizer.safetensors")

    seconds = []
    with tempfile.TemporaryDirectory() as place, RunFolder.create(Path(place) / "run", "bench", {}, {}) as folder:
        for _ in range(repeats):
            begun = time.perf_counter()
            folder.commit(write, {})
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _wall(command: list[str], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
