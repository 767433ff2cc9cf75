"""What a run folder says, read once and checked, for everything that reports on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perennial.errors import PerennialError
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Record:
    """One run, finished or not.

    Attributes:
        name: of the run, by default that of its folder.
        folder: of the run.
        run: the content of run.json.
        trained, held_out: names of the tasks, in order.
        matrices: (variant, decoder) -> the success matrix, cells missing where they are not evaluated yet.
        iterations: the iteration lines of metrics.jsonl.
        gates: the lines of metrics.jsonl that say what the gate did, see `gating`.
        accounts: the lines of metrics.jsonl that say what strategies did after a task, see `Strategy.account`.
        timings: the lines of timings.jsonl.
        videos: task -> row -> video file.
    """

    name: str
    folder: Path
    run: Mapping[str, Any]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    matrices: Mapping[tuple[str, str], SuccessMatrix]
    iterations: Sequence[Mapping[str, Any]]
    gates: Sequence[Mapping[str, Any]]
    accounts: Sequence[Mapping[str, Any]]
    timings: Sequence[Mapping[str, Any]]
    videos: Mapping[str, Mapping[int, Path]]

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
        return (self.trained,) if self.config.get("schedule") == "joint" else tuple((task,) for task in self.trained)

    @property
    def row_names(self) -> tuple[str, ...]:
        """What had just been taught, for each row of the success matrix."""
        return ("base", *(phase[0] if len(phase) == 1 else f"{len(phase)} tasks" for phase in self.phases))

    @property
    def phases_done(self) -> int:
        """How many phases are taught and evaluated, under every decoder and variant."""
        complete = np.all([(matrix.episodes() > 0).all(axis=1) for matrix in self.matrices.values()], axis=0)
        return max(int(np.logical_and.accumulate(complete).sum()) - 1, 0)

    @property
    def tasks_done(self) -> int:
        """How many tasks these are."""
        return sum(map(len, self.phases[: self.phases_done]))

    @property
    def finished(self) -> bool:
        """Whether every task was taught and everything evaluated."""
        return self.phases_done == len(self.phases)

    def matrix(self, decoder: str) -> SuccessMatrix:
        """The main variant's success matrix."""
        return self.matrices[self.variant, decoder]

    def so_far(self, decoder: str) -> SuccessMatrix | None:
        """The main variant's success matrix of the phases that are done, as if the run had ended then."""
        done, matrix = self.phases_done, self.matrix(decoder)
        taught = tuple(task for phase in self.phases[:done] for task in phase)
        return replace(matrix, trained=taught, successes=matrix.successes[: done + 1]) if done else None

    def lines(self, phase: int) -> list[Mapping[str, Any]]:
        """The iterations of a phase, counted from 0, its stages one after another."""
        return [line for line in self.iterations if line["task_index"] == phase + 1]

    def success_curve(self, phase: int) -> list[tuple[float, float]]:
        """(iteration, success in [0, 1]) of the training episodes of a phase."""
        numbered = enumerate(line.get("success") for line in self.lines(phase))
        return [(float(number), success) for number, success in numbered if success is not None]


def read(folder: Path) -> Record:
    """Read the run in `folder`, also while it is being written.

    Raises:
        PerennialError: it is no run folder, or its configuration or logs are damaged.
    """
    run = RunFolder.open(folder)
    try:
        config = run.header["config"]
        tasks, evaluation = config["tasks"], config["evaluation"]
        trained, held_out = tuple(tasks["trained"]), tuple(tasks["held_out"])
        cases = [(variant, decoder) for variant in evaluation["variants"] for decoder in evaluation["decoders"]]
    except (KeyError, TypeError) as error:
        raise PerennialError(
            f"{folder / 'run.json'} is damaged: its config has no {error}; restore it from a copy."
        ) from None
    videos: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("videos/[0-9]*/*.mp4")):
        videos.setdefault(path.stem, {})[int(path.parent.name)] = path
    return Record(
        name=folder.resolve().name,
        folder=folder,
        run=run.header,
        trained=trained,
        held_out=held_out,
        matrices={(v, d): SuccessMatrix.from_run(run, d, v) for v, d in cases},
        iterations=[row for row in run.rows("metrics") if row.get("event") == "iteration"],
        gates=[row for row in run.rows("metrics") if row.get("event") == "gate"],
        accounts=[row for row in run.rows("metrics") if row.get("event") == "strategy"],
        timings=run.rows("timings"),
        videos=videos,
    )
