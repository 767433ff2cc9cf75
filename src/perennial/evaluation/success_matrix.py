"""The success matrix S[i, j]: how well task j is done after training task i; row 0 is the base checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from perennial.errors import PerennialError
from perennial.evaluation.evaluate import includes_held_out
from perennial.storage.run_folder import RunFolder


@dataclass(frozen=True, eq=False)
class SuccessMatrix:
    """Outcomes of evaluation, episode by episode.

    Attributes:
        trained: names of the trained tasks in the order of training; the first columns.
        held_out: names of the tasks that are never trained; the last columns.
        successes: by row, then by task name, bool [episodes] with one entry for each evaluation initial state, the
            same states in the same order in every row. A run that is under way has cells missing.
        states: of the tasks with finitely many initial states, their number: episode i begins in state i modulo that.
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    successes: tuple[Mapping[str, np.ndarray], ...]
    states: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self.tasks:
            lengths = {len(row[task]) for row in self.successes if task in row}
            if len(lengths) > 1 or 0 in lengths:
                raise PerennialError(
                    f"The evaluations of {task!r} have {sorted(lengths)} episodes in different rows, but rows can only "
                    "be compared on the same initial states; evaluate them again with one number of episodes."
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (*self.trained, *self.held_out)

    def rates(self) -> np.ndarray:
        """Success rates in [0, 1], float64 [rows, tasks], NaN where a cell is missing."""
        return np.array(
            [[row[task].mean() if task in row else np.nan for task in self.tasks] for row in self.successes]
        )

    def episodes(self) -> np.ndarray:
        """Number of episodes behind each cell, int64 [rows, tasks], 0 where a cell is missing."""
        return np.array([[len(row.get(task, ())) for task in self.tasks] for row in self.successes], np.int64)

    @property
    def repeated(self) -> bool:
        """Whether there are fewer initial states than episodes, so that these are not independent."""
        return any(len(row[task]) > self.states.get(task, math.inf) for row in self.successes for task in row)

    def restricted(self, trained: Sequence[str], held_out: Sequence[str], episodes: Mapping[str, int]) -> Self:
        """The same rows, but only some tasks, in this matrix's order, and only the first `episodes[task]` states."""
        kept = {*trained, *held_out}
        return replace(
            self,
            trained=tuple(task for task in self.trained if task in trained),
            held_out=tuple(task for task in self.held_out if task in held_out),
            successes=tuple(
                {t: row[t][: episodes[t]] for t in self.tasks if t in kept and t in row} for row in self.successes
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON; successes become 0 and 1."""
        rows = [
            {task: np.asarray(row[task], int).tolist() for task in self.tasks if task in row} for row in self.successes
        ]
        content = {"trained": list(self.trained), "held_out": list(self.held_out), "successes": rows}
        return content | ({"states": dict(self.states)} if self.states else {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        rows = tuple({task: np.array(row[task], bool) for task in row} for row in content["successes"])
        return cls(tuple(content["trained"]), tuple(content["held_out"]), rows, content.get("states", {}))

    @classmethod
    def from_run(cls, run: RunFolder, decoder: str, variant: str) -> Self:
        """What the run in `run` has evaluated so far; joint training has one row after the base row.

        Raises:
            PerennialError: rows were evaluated on different numbers of episodes.
        """
        config = run.header["config"]
        evaluation, trained = config["evaluation"], tuple(config["tasks"]["trained"])
        included = includes_held_out(variant, evaluation["variants"], evaluation.get("held_out", "all"))
        held_out = tuple(config["tasks"]["held_out"]) if included else ()
        phases = 1 if config.get("schedule") == "joint" else len(trained)
        rows: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in range(phases + 1))
        states: dict[str, int] = {}
        for cell, outcome in run.cells().items():
            if (cell.decoder, cell.variant) == (decoder, variant) and cell.row <= phases:
                rows[cell.row][cell.task] = np.array(outcome.successes, bool)
                if outcome.states is not None:
                    states[cell.task] = outcome.states
        return cls(trained, held_out, rows, states)
