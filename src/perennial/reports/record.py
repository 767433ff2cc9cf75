"""What a run folder says, read once and checked, for everything that reports on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.storage.cells import Outcome
from perennial.storage.run_folder import RunFolder

Outcomes = Mapping[tuple[int, str], Outcome]
"""(row, task) -> what its evaluation gave."""


@dataclass(frozen=True)
class Record:
    """One run, finished or not.

    Attributes:
        folder: where it is; its name is the name of the run.
        run: the content of run.json.
        trained, held_out: names of the tasks, in order.
        cells: (variant, decoder) -> the evaluated cells.
        iterations: the iteration lines of metrics.jsonl.
        timings: the lines of timings.jsonl.
        videos: task -> row -> video file.
    """

    folder: Path
    run: Mapping[str, Any]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    cells: Mapping[tuple[str, str], Outcomes]
    iterations: Sequence[Mapping[str, Any]]
    timings: Sequence[Mapping[str, Any]]
    videos: Mapping[str, Mapping[int, Path]]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.resolve().name

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration as JSON."""
        config: Mapping[str, Any] = self.run["config"]
        return config

    @property
    def tasks(self) -> tuple[str, ...]:
        """The columns of the success matrix."""
        return self.trained + self.held_out

    @property
    def decoders(self) -> tuple[str, ...]:
        """The decoders that are evaluated; the first one is the main one."""
        return tuple(self.config["evaluation"]["decoders"])

    @property
    def variant(self) -> str:
        """The main variant of the tasks."""
        return str(self.config["evaluation"]["variants"][0])

    @property
    def phases(self) -> tuple[tuple[str, ...], ...]:
        """The tasks that are taught together, phase by phase; a row of the success matrix follows each phase."""
        return (self.trained,) if self.config["schedule"] == "joint" else tuple((task,) for task in self.trained)

    @property
    def row_names(self) -> tuple[str, ...]:
        """What had just been taught, for each row of the success matrix."""
        return ("base", *(phase[0] if len(phase) == 1 else f"{len(phase)} tasks" for phase in self.phases))

    @property
    def rows(self) -> int:
        """How many leading rows of the success matrix are complete under every decoder and variant."""
        done = 0
        while done <= len(self.phases) and all(
            (done, task) in cells for cells in self.cells.values() for task in self.tasks
        ):
            done += 1
        return done

    @property
    def finished(self) -> bool:
        """Whether every task was taught and everything evaluated."""
        return self.rows == len(self.phases) + 1

    def matrix(self, decoder: str) -> SuccessMatrix:
        """The complete rows of the main variant's success matrix."""
        cells = self.cells[self.variant, decoder]
        rows = tuple(tuple(cells[row, task].successes for task in self.tasks) for row in range(self.rows))
        return SuccessMatrix(self.tasks, len(self.trained), rows)

    def lines(self, phase: int) -> list[Mapping[str, Any]]:
        """The iterations of a phase, counted from 0, its stages one after another."""
        return [line for line in self.iterations if line["task_index"] == phase + 1]

    def success_curve(self, phase: int) -> list[tuple[float, float]]:
        """(iteration, success in [0, 1]) of the training episodes of a phase."""
        numbered = enumerate(line.get("success") for line in self.lines(phase))
        return [(float(number), success) for number, success in numbered if success is not None]


def percent(outcome: Outcome) -> float:
    """The share of successful episodes, in percent."""
    return 100 * sum(outcome.successes) / len(outcome.successes)


def read(folder: Path) -> Record:
    """Read the run in `folder`, also while it is being written.

    Raises:
        PerennialError: it is no run folder, or its configuration or logs are damaged.
    """
    run = RunFolder.open(folder)
    tasks, evaluation = run.header["config"]["tasks"], run.header["config"]["evaluation"]
    cells: dict[tuple[str, str], dict[tuple[int, str], Outcome]] = {
        (variant, decoder): {} for variant in evaluation["variants"] for decoder in evaluation["decoders"]
    }
    for cell, outcome in run.cells().items():
        cells.setdefault((cell.variant, cell.decoder), {})[cell.row, cell.task] = outcome
    videos: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("videos/[0-9]*/*.mp4")):
        videos.setdefault(path.stem, {})[int(path.parent.name)] = path
    return Record(
        folder=folder,
        run=run.header,
        trained=tuple(tasks["trained"]),
        held_out=tuple(tasks["held_out"]),
        cells=cells,
        iterations=[row for row in run.rows("metrics") if row.get("event") == "iteration"],
        timings=run.rows("timings"),
        videos=videos,
    )
