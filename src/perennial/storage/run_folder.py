"""The run folder: everything a run knows, so that it can be killed anywhere and go on bit for bit.

- `run.json`: what the run is, written once.
- `commits/`: the last two states of training, each an atomic commit.
- `tasks/`: the adapter after each task, atomic too.
- `evaluations/`: the cells of the success matrix.
- `metrics.jsonl`: what happened, the same in every repetition; `timings.jsonl`: how long it took.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import perennial
from perennial.errors import PerennialError
from perennial.storage import atomic
from perennial.storage.cells import Cell, cell_path, read_cell, write_cell
from perennial.storage.logs import JsonLines

FORMAT = 1
KEPT_COMMITS = 2


@dataclass(frozen=True)
class Commit:
    """A state of training from which a run can go on.

    Attributes:
        number: counts the commits of the run from 1.
        folder: holds the adapter, the optimiser and the strategy.
        state: what was given to `RunFolder.commit`, with the lengths of the logs under "log_bytes".
        warning: a sentence if newer commits are damaged and were passed over, otherwise empty.
    """

    number: int
    folder: Path
    state: dict[str, Any]
    warning: str = ""


class RunFolder:
    """One run on disk; `create` and `resume` lock it for writing until it is closed, `open` only reads.

    Attributes:
        path: of the folder.
        metrics, timings: the two logs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.timings = JsonLines(path / "timings.jsonl")
        self._lock: TextIO | None = None
        self._newest: int | None = None

    @classmethod
    def create(cls, path: Path, preset: str, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Self:
        """Start a new run.

        Raises:
            PerennialError: the folder is not empty, cannot be written, or another process writes there.
        """
        with atomic.explained(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._acquire()
        try:
            atomic.clean(path)
            if any(child.name != ".lock" for child in path.iterdir()):
                raise PerennialError(
                    f"The folder {path} is not empty; go on with the run in it by `perennial resume {path}`, "
                    "or choose another folder."
                )
            content = {"format": FORMAT, "perennial": perennial.__version__, "preset": preset}
            atomic.write_json(path / "run.json", content | {"config": config, "environment": environment})
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Look at a run, also while another process writes it.

        Raises:
            PerennialError: it is no run folder, or one of a newer Perennial.
        """
        run = cls(path)
        if run.description.get("format") != FORMAT:
            raise PerennialError(
                f"{path} has run format {run.description.get('format')}, but this Perennial reads format {FORMAT}; "
                "use the version that wrote it."
            )
        return run

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Open a run for writing and remove what interrupted writes left behind.

        Raises:
            PerennialError: it is no run folder, or another process writes there.
        """
        run = cls.open(path)
        run._acquire()
        try:
            atomic.clean(path)
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def description(self) -> dict[str, Any]:
        """The content of run.json: format, perennial, preset, config, environment."""
        path = self.path / "run.json"
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict):
                return content
        except (FileNotFoundError, NotADirectoryError):
            raise PerennialError(
                f"{self.path} is not a run folder: it has no run.json; give the folder of a run, "
                "for example runs/demo-seed0."
            ) from None
        except ValueError:
            pass
        raise PerennialError(f"{path} is damaged: it is not a JSON object; restore it from a copy.")

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration as JSON."""
        config = self.description.get("config")
        if not isinstance(config, dict):
            raise PerennialError(f"{self.path / 'run.json'} is damaged: it has no config; restore it from a copy.")
        return config

    def commit(self, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """Add a commit with the tensors that `write(folder)` saves and the JSON `state`; keep the last two.

        Raises:
            PerennialError: the disk is full or read-only; the former commits are intact.
        """
        if self._newest is None:
            commit = self.latest()
            self._newest = commit.number if commit else 0
        number = self._newest + 1
        log_bytes = {log.path.name: log.size() for log in (self.metrics, self.timings)}
        full_state = {**state, "log_bytes": log_bytes, "run_sha256": atomic.sha256(self.path / "run.json")}

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / "state.json").write_text(json.dumps(full_state, allow_nan=False), encoding="utf-8")

        atomic.commit_folder(self._commit(number), write_all)
        self._newest = number
        with atomic.explained(self.path / "commits"):
            for old in self._numbers():
                if not number - KEPT_COMMITS < old <= number:
                    shutil.rmtree(self._commit(old))
        return self._commit(number)

    def latest(self) -> Commit | None:
        """The newest commit that is whole; None before the first one.

        Raises:
            PerennialError: there are commits, but all are damaged; it names the damaged file of the newest.
        """
        damage = ""
        for number in reversed(self._numbers()):
            folder = self._commit(number)
            try:
                atomic.verify(folder)
            except PerennialError as error:
                damage = damage or str(error)
                continue
            state = json.loads((folder / "state.json").read_bytes())
            warning = f"{damage} Going on from the older commit {folder.name}." if damage else ""
            return Commit(number, folder, state, warning)
        if damage:
            raise PerennialError(f"{damage} There is no older commit to go on from.")
        return None

    def rewind(self) -> Commit | None:
        """The newest whole commit, with both logs cut back to the lengths they had then.

        Raises:
            PerennialError: all commits are damaged, or run.json was changed since.
        """
        commit = self.latest()
        if commit is not None and commit.state["run_sha256"] != atomic.sha256(self.path / "run.json"):
            raise PerennialError(
                f"{self.path / 'run.json'} was changed after the run began, so going on would mix two experiments; "
                "undo the change or start a new run."
            )
        self._newest = commit.number if commit else 0
        for log in (self.metrics, self.timings):
            log.truncate(commit.state["log_bytes"][log.path.name] if commit else 0)
        return commit

    def commit_task(self, index: int, name: str, write: Callable[[Path], None]) -> Path:
        """Keep what `write(folder)` saves (`adapter/`) as the policy after the `index`-th task, counted from 1."""
        folder = self.path / "tasks" / f"{index:02d}-{name}"
        atomic.commit_folder(folder, write)
        return folder

    def task_adapter(self, index: int, name: str) -> Path:
        """The PEFT folder of the policy after the `index`-th task.

        Raises:
            PerennialError: it is missing or damaged.
        """
        folder = self.path / "tasks" / f"{index:02d}-{name}"
        atomic.verify(folder)
        return folder / "adapter"

    def write_cell(self, cell: Cell) -> None:
        """Keep one evaluated cell of the success matrix."""
        write_cell(self.path / "evaluations", cell)

    def cell(self, row: int, decoder: str, variant: str, task: str) -> Cell | None:
        """One cell, None if it was not evaluated or its file is damaged."""
        evaluations = self.path / "evaluations"
        return read_cell(evaluations, cell_path(evaluations, row, decoder, variant, task))

    def has_cell(self, row: int, decoder: str, variant: str, task: str) -> bool:
        """Whether the cell was evaluated and its file is whole."""
        return self.cell(row, decoder, variant, task) is not None

    def cells(self) -> list[Cell]:
        """All cells whose files are whole, ordered by path."""
        evaluations = self.path / "evaluations"
        read = (read_cell(evaluations, path) for path in sorted(evaluations.glob("*/*/*/*.json")))
        return [cell for cell in read if cell is not None]

    def _commit(self, number: int) -> Path:
        return self.path / "commits" / f"{number:06d}"

    def _numbers(self) -> list[int]:
        """Numbers of the commit folders, whole or not, ascending."""
        return sorted(int(folder.name) for folder in (self.path / "commits").glob("[0-9]*") if folder.name.isdigit())

    def _acquire(self) -> None:
        """Lock the folder; the kernel gives the lock back when this process ends, however it ends."""
        path = self.path / ".lock"
        with atomic.explained(path):
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise PerennialError(
                    f"Process {holder} is writing to {self.path}; wait for it or stop it, then try again."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._lock = file


def default_path(preset: str, seed: int, root: Path = Path("runs")) -> Path:
    """The first free one of `runs/PRESET-seedSEED`, `runs/PRESET-seedSEED-2`, and so on."""
    path, number = root / f"{preset}-seed{seed}", 1
    while path.exists():
        number += 1
        path = root / f"{preset}-seed{seed}-{number}"
    return path


def new_cell(
    row: int, decoder: str, variant: str, task: str, successes: Sequence[bool], env_steps: Sequence[int]
) -> Cell:
    """A cell from the outcomes of the episodes, in the order of the evaluation initial states."""
    return Cell(row, decoder, variant, task, tuple(map(int, successes)), tuple(map(int, env_steps)))
