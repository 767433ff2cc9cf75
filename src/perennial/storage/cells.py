"""Cells of the success matrix on disk: one small JSON file each, sealed by its own hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perennial.storage.atomic import write_json


@dataclass(frozen=True)
class Cell:
    """The outcome of evaluating one task once.

    Attributes:
        row: 0 for the base checkpoint, i after the i-th phase of training.
        decoder: "sampled" or "greedy".
        variant: of the task, for example "id".
        task: its name.
        successes: 1 or 0 for each evaluation initial state, in the same order in every row.
        env_steps: environment steps that each episode took.
    """

    row: int
    decoder: str
    variant: str
    task: str
    successes: tuple[int, ...]
    env_steps: tuple[int, ...]


def cell_path(evaluations: Path, row: int, decoder: str, variant: str, task: str) -> Path:
    """Where the cell lies below the folder `evaluations`."""
    return evaluations / f"{row:02d}" / decoder / variant / f"{task}.json"


def write_cell(evaluations: Path, cell: Cell) -> None:
    """Write the cell atomically."""
    content = asdict(cell)
    path = cell_path(evaluations, cell.row, cell.decoder, cell.variant, cell.task)
    write_json(path, content | {"sha256": _digest(content)})


def read_cell(evaluations: Path, path: Path) -> Cell | None:
    """The cell in the file at `path`; None if it is missing, damaged or lies where another cell belongs."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _digest(content):
            return None
        cell = Cell(**content | {"successes": tuple(content["successes"]), "env_steps": tuple(content["env_steps"])})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return cell if path == cell_path(evaluations, cell.row, cell.decoder, cell.variant, cell.task) else None


def _digest(content: Any) -> str:
    """SHA-256 of the canonical JSON of a cell."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
