"""What is kept of each run of a study: one small JSON file with every evaluated episode, training curves and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perennial.errors import PerennialError
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports.record import Record, read
from perennial.storage import atomic
from perennial.studies.base import Entry, without_place

FORMAT = 1
COSTS = (
    "rollout_seconds",
    "update_seconds",
    "commit_seconds",
    "train_env_steps",
    "strategy_seconds",
    "strategy_episodes",
    "strategy_env_steps",
    "evaluation_seconds",
    "gate_seconds",
    "evaluation_env_steps",
    "peak_bytes",
    "kept_bytes",
)
"""What a run costs. Strategies: before and after tasks; steps of evaluation: with those of the gate; peak: the largest
resident set of one of its processes, known where it worked in one piece; kept: what is carried from the last task to a
next one. Older versions did not measure all of it."""
NOT_MEASURED = ("peak_bytes", 0)
"""How older results say so of the peak."""


@dataclass(frozen=True)
class Result:
    """A finished run of a study.

    Attributes:
        row, seed: its place in the study's tables.
        matrices: (variant, decoder) -> the success matrix, in the order in which they were evaluated.
        training: for each phase the success of the training episodes by iteration, in [0, 1]; empty without episodes.
        cost: those of `COSTS` that are known.
        content: the whole file.
    """

    row: str
    seed: int
    matrices: Mapping[tuple[str, str], SuccessMatrix]
    training: tuple[tuple[float, ...], ...]
    cost: Mapping[str, float]
    content: Mapping[str, Any]


def path(folder: Path, entry: Entry) -> Path:
    """Where the result of a run is kept."""
    return folder / "results" / f"{entry.name}.json"


def write(folder: Path, entry: Entry, study: str, peak_bytes: int | None) -> None:
    """Keep what the finished run of `entry` in the study's `folder` says, and its peak where that is known."""
    run = folder / "runs" / entry.name
    record = read(run)
    content = {
        "format": FORMAT,
        "study": study,
        "method": entry.method,
        "order": entry.order,
        "seed": entry.seed,
        "command": entry.command(),
        "perennial": record.run["perennial"],
        "environment": record.run["environment"],
        "config": without_place(record.config, folder),
        "cost": _cost(record) | ({"peak_bytes": peak_bytes} if peak_bytes else {}) | {"kept_bytes": _kept_bytes(run)},
        "training": [
            [round(success, 4) for _, success in record.success_curve(phase)] for phase in range(len(record.phases))
        ],
        "accounts": list(record.accounts),
        "matrices": [
            {"variant": variant, "decoder": decoder, **_packed(matrix)}
            for (variant, decoder), matrix in record.matrices.items()
        ],
    }
    atomic.write_json(path(folder, entry), content)


def study_name(folder: Path) -> str:
    """The name of the study in `folder`.

    Raises:
        PerennialError: there is none, or its study.json is damaged.
    """
    try:
        return str(json.loads((folder / "study.json").read_bytes())["study"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PerennialError(
            f"{folder} holds no study: its study.json cannot be read ({error}); choose another folder."
        ) from None


def has(folder: Path, entry: Entry) -> bool:
    """Whether the result of `entry` is there.

    Raises:
        PerennialError: there is one, but it was made with other settings.
    """
    place = path(folder, entry)
    if not place.exists():
        return False
    if not entry.matches(load(place).content["config"]):
        raise PerennialError(
            f"{place} was made with other settings than {entry.method!r} has in this study; "
            "move it away to make it again, or choose another folder."
        )
    return True


def load(place: Path) -> Result:
    """Read one result.

    Raises:
        PerennialError: the file is damaged or of another format.
    """
    try:
        content = json.loads(place.read_bytes())
        if content["format"] != FORMAT:
            raise PerennialError(
                f"{place} has format {content['format']}, but this Perennial reads format {FORMAT}; "
                "use the version that wrote it."
            )
        order = "" if content["order"] == "given" else f"-{content['order']}"
        return Result(
            row=content["method"] + order,
            seed=content["seed"],
            matrices={(m["variant"], m["decoder"]): _unpacked(m) for m in content["matrices"]},
            training=tuple(map(tuple, content["training"])),
            cost={key: value for key, value in content["cost"].items() if (key, value) != NOT_MEASURED},
            content=content,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PerennialError(f"{place} is damaged ({error!r}); move it away, and the study makes it again.") from error


def _packed(matrix: SuccessMatrix) -> dict[str, Any]:
    """The matrix with the episodes of each cell as one string of 0 and 1."""
    content = matrix.to_json()
    rows = [{task: "".join(map(str, outcomes)) for task, outcomes in row.items()} for row in content["successes"]]
    return content | {"successes": rows}


def _unpacked(content: Mapping[str, Any]) -> SuccessMatrix:
    rows = [{task: list(map(int, outcomes)) for task, outcomes in row.items()} for row in content["successes"]]
    return SuccessMatrix.from_json({**content, "successes": rows})


def _cost(record: Record) -> dict[str, float]:
    parts = ("rollout_seconds", "update_seconds", "commit_seconds")
    seconds = {part: sum(line.get(part, 0.0) for line in record.timings) for part in parts}
    evaluations = [line for line in record.timings if line.get("event") == "evaluation"]
    gates = [line for line in record.timings if line.get("event") == "gate"]
    strategies = [line for line in record.timings if line.get("event") == "strategy"]
    hooks = {line["hook"] for line in strategies}
    whole = len(strategies) == len(hooks) * len(record.phases) > 0  # unless an older version made the run, or a part
    return {
        **{part: round(value, 1) for part, value in seconds.items()},
        "evaluation_seconds": round(sum(line["seconds"] for line in evaluations), 1),
        "gate_seconds": round(sum(line["evaluation_seconds"] for line in gates), 1),
        "train_env_steps": sum(line["env_steps"] for line in record.iterations),
        "evaluation_env_steps": sum(line["env_steps"] for line in (*evaluations, *gates)),
        **(_strategies_cost(strategies) if whole else {}),
    }


def _strategies_cost(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "strategy_seconds": round(sum(line["seconds"] for line in lines), 1),
        "strategy_episodes": sum(line["episodes"] for line in lines),
        "strategy_env_steps": sum(line["env_steps"] for line in lines),
    }


def _kept_bytes(run: Path) -> int:
    last = max((run / "tasks").iterdir())
    return int(np.sum([file.stat().st_size for file in last.rglob("*.safetensors")]))
