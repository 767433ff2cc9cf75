"""Writes docs/benchmarks.md from results.json, strategies.json and suites.json in this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perennial.reports import words

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
    "commit_ms": "atomic commit of adapter and optimiser, ms",
    "cli_help_seconds": "`perennial --help`, seconds",
    "python_start_seconds": "an empty Python process, seconds",
    "peak_memory_mb": "peak memory of the learner, MB",
}
STRATEGIES = """## Strategies

Measured by `python benchmarks/strategies.py` at the default configuration: by how much a strategy lengthens a gradient
step, in **processor time**, because other work shared the machine. What replays is compared with a plain step on as
many samples in the same micro-batches: every replayed sample costs what a sample of the update costs, and the table
says what comes on top. Figures are medians of {steps} pairs of steps that followed each other; differences of one or
two percent are noise."""
GUARDS = {"ewc": "EWC", "replay": "experience replay", "dark_replay": "dark experience replay"}
SUITES = """## Suites

Measured by `python benchmarks/suites.py SUITE TASK`, which adds its row here, in the environment of each suite, one
process at a time. Seconds are of **processor time**, not of the clock, because other work shared the machine. A row is
the medians of the repetitions in one run."""
COLUMNS = {
    "steps/s": "{steps_per_second}",
    "images/s at 64, 224 pixels": "{images_per_second_64}, {images_per_second_224}",
    "steps/s with a policy": "{collected_steps_per_second}",
    "steps/s without it": "{replayed_steps_per_second}",
    "share": "{share_of_ceiling}",
    "construction, another, s": "{construction_seconds}, {further_seconds}",
    "reset, ms": "{reset_ms}",
    "memory, without suite, MB": "{memory_mb}, {memory_without_suite_mb}",
    "repetitions": "{repeats}",
}
SUITES_READING = """Steps alone are of random actions, without pictures. The policy is the small one with random weights
and one thread: it plays {slots} episodes side by side and looks once in eight steps. Without it, the same actions and
images are replayed one episode after the other; share is the median of paired ratios. What is missing is the forward
pass, and for LIBERO also that the environments of a task take turns in one scene. Construction is importing the
simulator, the first environment, its first reset and its first picture; a reset is to a state that was visited before.
Memory is all of such a worker, torch included, and what it was before the suite."""


def write() -> str:
    """Write the page and return it."""
    names = ("results.json", "strategies.json", "suites.json")
    text = page(*(json.loads((ROOT / "benchmarks" / name).read_text()) for name in names))
    (ROOT / "docs" / "benchmarks.md").write_text(text)
    return text


def page(results: Mapping[str, Any], strategies: Mapping[str, Any], suites: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
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
    for part in ("rollout", "learning", "house"):
        lines += [f"| {WORDS[name]} | {_number(value)} |" for name, value in results.get(part, {}).items()]
    return "\n".join([*lines, "", READING, "", *_strategies(strategies), "", *_suites(suites)]) + "\n"


def _strategies(found: Mapping[str, Any]) -> list[str]:
    """The table of the strategies."""
    machine = found["machine"]
    return [
        STRATEGIES.format(steps=found["steps"]),
        "",
        "| strategy | adds to a step of as many rows |",
        "|---|---|",
        *(f"| {GUARDS[name]} | {words.points(100 * share, True)} % |" for name, share in found["overhead"].items()),
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {machine['torch']}.",
    ]


def _suites(found: Mapping[str, Any]) -> list[str]:
    """The table of the suites."""
    lines = [SUITES, "", f"| suite | task | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for suite, measured in sorted(found.items()):
        for task, row in measured["tasks"].items():
            values = {name: _number(value) for name, value in row.items()}
            cells = [cell.format(**values) for cell in COLUMNS.values()]
            lines.append(f"| `{suite}` | `{task}` | " + " | ".join(cells) + " |")
    lines += ["", SUITES_READING.format(slots=next(iter(found.values()))["slots"]), ""]
    for suite, measured in sorted(found.items()):
        machine = measured["machine"]
        lines.append(
            f"- `{suite}`: {machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}, "
            f"Python {machine['python']}, torch {machine['torch']}, MuJoCo {machine.get('mujoco') or 'not used'}."
        )
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
