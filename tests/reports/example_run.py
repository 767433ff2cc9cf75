"""Writes an example run folder."""

import json

import numpy as np

from perennial.reports import video
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder

TRAINED = ["handle-press-v3", "button-press-topdown-v3", "drawer-close-v3", "window-open-v3", "reach-v3"]
HELD_OUT = ["window-close-v3", "handle-pull-v3", "door-close-v3"]
BASE = [0.32, 0.45, 0.52, 0.2, 0.38, 0.3, 0.12, 0.55]


def write_example(
    folder,
    trained=TRAINED,
    held_out=HELD_OUT,
    rows=None,
    episodes=40,
    iterations=12,
    seed=0,
    boost=0.5,
    videos=True,
    decoders=("sampled", "greedy"),
    kept=None,
    strategies=(),
):
    """A run that has filled matrix rows 0 .. `rows` (default: all of them)."""
    rng = np.random.default_rng(seed)
    columns = [*trained, *held_out]
    finished = len(trained) if rows is None else rows
    config = {
        "seed": seed,
        "suite": "metaworld",
        "schedule": "sequential",
        "tasks": {"trained": list(trained), "held_out": list(held_out)},
        "policy": {"name": "openvla_oft", "checkpoint": "tiny"},
        "recipe": [{"objective": "grpo", "iterations": iterations, "learning_rate": 2e-4}],
        "strategies": list(strategies),
        "evaluation": {"episodes": episodes, "temperature": 1.0, "decoders": list(decoders), "variants": ["id"]},
    }
    environment = {"python": "3.11.2", "torch": "2.13.0", "mujoco": "3.3.0", "cpu": "Example CPU, 2 cores"}
    with RunFolder.create(folder, "demo", config, environment) as run:
        write_rows(run, finished, columns, len(trained), episodes, decoders, boost, rng)
    write_logs(folder, trained[: finished + 1] if rows is not None else trained, iterations, rng, boost, kept)
    if videos:
        for row in sorted({0, finished}):
            for column, task in enumerate(columns):
                video.encode(clip(column, row), folder / "videos" / f"{row:02d}" / f"{task}.mp4")
    return folder


def rate_at(row, column, trained, boost):
    base = BASE[column % len(BASE)]
    if column >= trained:
        return base + 0.02 * row
    if row <= column:
        return base + 0.015 * row
    return min(base + boost, 0.95) - 0.015 * (row - column - 1)


def write_rows(run, finished, columns, trained, episodes, decoders, boost, rng):
    for row in range(finished + 1):
        for decoder in decoders:
            for column, task in enumerate(columns):
                rate = rate_at(row, column, trained, boost) + (0.04 if decoder == "greedy" else 0)
                successes = rng.random(episodes) < min(rate, 0.98)
                run.write_cell(Cell(row, decoder, "id", task), successes, np.where(successes, 50, 150))
            keys = {"event": "evaluation", "row": row, "decoder": decoder}
            run.log("timings", {**keys, "seconds": 21.0 + row, "episodes": 320, "env_steps": 28000})


def write_logs(folder, tasks, iterations, rng, boost, kept):
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "timings.jsonl").open("a") as timings:
        for index, task in enumerate(tasks, start=1):
            for step in range(iterations):
                base = BASE[(index - 1) % len(BASE)]
                success = base + boost * (1 - np.exp(-step / 4)) + 0.03 * rng.standard_normal()
                keys = {"task_index": index, "stage": 0, "iteration": step}
                line = {
                    "event": "iteration", "task": task, **keys, "objective": "grpo",
                    "success": float(np.clip(success, 0, 1)), "episodes": 128, "env_steps": int(9000 - 250 * step),
                    "loss": float(0.02 * rng.standard_normal()), "kl": float(0.004 + 0.003 * rng.random()),
                    "clip_fraction": float(0.08 + 0.03 * rng.random()), "grad_norm": float(0.6 + 0.2 * rng.random()),
                    "kept": kept if kept is not None else float(0.75 - 0.03 * step), "penalty": 0.0,
                }  # fmt: skip
                metrics.write(json.dumps(line) + "\n")
                seconds = {"rollout_seconds": 6.5, "update_seconds": 4.25, "commit_seconds": 0.4}
                timings.write(json.dumps({**keys, **seconds}) + "\n")


def clip(column, row, frames=30, size=128):
    """A dot that wanders over a coloured ground."""
    pictures = np.zeros((frames, size, size, 3), np.uint8)
    pictures[:] = (60 + 20 * column, 90, 140 - 30 * bool(row))
    for frame in range(frames):
        x = 8 + frame * 3
        pictures[frame, 50:70, x : x + 20] = (240, 230, 90)
    return pictures
