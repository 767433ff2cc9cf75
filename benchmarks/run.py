"""`make bench`: measures everything in one run and writes benchmarks/results.json and docs/benchmarks.md.

python benchmarks/run.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import house
import learning
import naive
import rollout
import strategies
from perennial.config import preset
from perennial.doctor import describe_machine

ROOT = Path(__file__).parent.parent
READING = """## How to read it

The ceiling replays the same episodes, actions and images in as many processes, without a policy and without collecting
anything. What lies between it and a rollout is almost only the forward pass, which shares the core with the simulator:
there is no waiting and no communication while a worker plays its share. The simulator itself was made faster first (no
needless drawing, resets without settling twice, one renderer a task), which raises the ceiling and so lowers the share.
The plain way draws a picture in default quality at every step; it is there to show what drawing costs.

What the 7B model takes on a GPU is on [another page](gpu-benchmarks.md); so far it is counted, not measured."""
WORDS = {
    "steps_per_second": "environment steps per second while a policy acts",
    "ceiling_steps_per_second": "the same steps and images without a policy",
    "naive_steps_per_second": "the plain way: `AsyncVectorEnv` of Meta-World, a default picture every step, no policy",
    "share_of_ceiling": "share of the simulator's ceiling (median of paired ratios)",
    "episodes_per_second": "episodes per second",
    "act_ms_per_decision": "policy forward, ms per decision on one thread",
    "update_seconds": "one GRPO update, seconds",
    "updated_decisions_per_second": "decisions trained on per second of update",
    "decisions_to_the_horizon": "decisions if every episode ran to the horizon",
    "decisions_played": "decisions that were played",
    "decisions_trained_on": "decisions with a gradient",
    "share_of_work_saved": "share of forward and backward passes saved, with the same gradient",
    "ewc_overhead": "share of a gradient step's processor time that EWC adds",
    "replay_overhead": "the same for ER, beyond that of the samples it replays",
    "dark_replay_overhead": "the same for DER",
    "commit_ms": "atomic commit of adapter and optimiser, ms",
    "cli_help_seconds": "`perennial --help`, seconds",
    "python_start_seconds": "an empty Python process, seconds",
    "peak_memory_mb": "peak memory of the learner, MB",
    "peak_worker_memory_mb": "peak memory of the largest worker, MB",
}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Benchmarks of the default configuration.")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    config = preset("demo")
    plain = {"naive_steps_per_second": naive.measure(config.tasks.trained[0], 64, repeats)}
    results = {
        "machine": describe_machine(),
        "repeats": repeats,
        "rollout": rollout.measure(config, repeats) | plain,
        "learning": learning.measure(config, repeats),
        "strategies": strategies.measure(config, repeats),
        "house": house.measure(config, repeats),
    }
    (ROOT / "benchmarks" / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text(_page(results))
    print(page.read_text())


def _page(results: dict) -> str:  # type: ignore[type-arg]
    """The table as Markdown."""
    machine = results["machine"]
    lines = [
        "# Benchmarks",
        "",
        "Measured by `make bench` at the default configuration (preset `demo`), medians of "
        f"{results['repeats']} repetitions in one run.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['gpu'] or 'no GPU'}, Python {machine['python']}, torch {machine['torch']}, "
        f"MuJoCo {machine['mujoco']}.",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    for part in ("rollout", "learning", "strategies", "house"):
        lines += [f"| {WORDS[name]} | {_number(value)} |" for name, value in results[part].items()]
    return "\n".join([*lines, "", READING]) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    main()
