"""Cells of the success matrix on disk: one small JSON file each, sealed by its own hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perennial.storage.atomic import write_json


@dataclass(frozen=True)
class Cell:
    """One cell of the success matrix.

    Attributes:
        row: 0 for the base checkpoint, i after the i-th phase of training.
        decoder: "sampled" or "greedy".
        variant: of the task, for example "id".
        task: its name.
    """

    row: int
    decoder: str
    variant: str
    task: str


@dataclass(frozen=True)
class Outcome:
    """What evaluating a cell gave, by evaluation initial state, in the same order in every row.

    Attributes:
        successes: 1 or 0.
        env_steps: environment steps that the episode took.
        states: how many initial states there are if they are finite; they are played in turn.
    """

    successes: tuple[int, ...]
    env_steps: tuple[int, ...]
    states: int | None = None


def cell_path(evaluations: Path, cell: Cell) -> Path:
    """Where the cell lies below the folder `evaluations`."""
    return evaluations / f"{cell.row:02d}" / cell.decoder / cell.variant / f"{cell.task}.json"


def write_cell(evaluations: Path, cell: Cell, outcome: Outcome) -> None:
    """Write the cell atomically.

    Raises:
        PerennialError: the disk is full or cannot be written.
    """
    content = {"row": cell.row, "decoder": cell.decoder, "variant": cell.variant, "task": cell.task} | asdict(outcome)
    if outcome.states is None:
        del content["states"]
    write_json(cell_path(evaluations, cell), content | {"sha256": _digest(content)})


def read_cell(evaluations: Path, cell: Cell) -> Outcome | None:
    """The outcome of `cell`; None if it was not evaluated or its file is damaged."""
    found = _read(cell_path(evaluations, cell))
    return found[1] if found is not None and found[0] == cell else None


def read_cells(evaluations: Path) -> Iterator[tuple[Cell, Outcome]]:
    """All cells whose files are whole, ordered by path."""
    for path in sorted(evaluations.glob("*/*/*/*.json")):
        found = _read(path)
        if found is not None and cell_path(evaluations, found[0]) == path:
            yield found


def _read(path: Path) -> tuple[Cell, Outcome] | None:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _digest(content):
            return None
        cell = Cell(content["row"], content["decoder"], content["variant"], content["task"])
        return cell, Outcome(tuple(content["successes"]), tuple(content["env_steps"]), content.get("states"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _digest(content: Any) -> str:
    """SHA-256 of the canonical JSON of a cell, its `sha256` field left out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
