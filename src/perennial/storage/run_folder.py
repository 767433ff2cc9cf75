"""The run folder: everything a run knows, so that it can be killed anywhere and go on bit for bit.

- `run.json`: what the run is, written once.
- `commits/`: the last two states of training, each an atomic commit.
- `tasks/`: the adapter after each task, atomic too.
- `evaluations/`: the cells of the success matrix.
- `metrics.jsonl`: what happened, the same in every repetition; `timings.jsonl`: how long it took.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import perennial
from perennial.errors import PerennialError
from perennial.storage import atomic, lock
from perennial.storage.cells import Cell, Outcome, read_cell, read_cells, write_cell
from perennial.storage.logs import JsonLines

FORMAT = 1
KEPT_COMMITS = 2


@dataclass(frozen=True)
class Commit:
    """A state of training from which a run can go on.

    Attributes:
        number: counts the commits of the run from 1.
        path: of the folder with the adapter, the optimiser and the strategy.
        state: what was given to `RunFolder.commit`, with the lengths of the logs under "log_bytes".
        warning: a sentence if newer commits are damaged and were passed over, otherwise empty.
    """

    number: int
    path: Path
    state: dict[str, Any]
    warning: str = ""


class RunFolder:
    """One run on disk; `create` and `open_locked` lock it for writing until it is closed, `open` only reads.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._logs = {name: JsonLines(path / f"{name}.jsonl") for name in ("metrics", "timings")}
        self._lock: TextIO | None = None
        self._newest = 0

    @classmethod
    def create(cls, path: Path, preset: str, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Self:
        """Start a new run.

        Raises:
            PerennialError: the folder is not empty, cannot be written, or another process writes there.
        """
        with atomic.explained(path):
            path.mkdir(parents=True, exist_ok=True)
        # Killed before run.json was complete, a run leaves these two behind, and has not begun.
        if any(child.name != ".lock" and not child.name.startswith(".run.json.") for child in path.iterdir()):
            raise PerennialError(
                f"The folder {path} is not empty; go on with the run in it by `perennial resume {path}`, "
                "or choose another folder."
            )
        run = cls(path)
        run._lock = lock.acquire(path)
        try:
            content = {"format": FORMAT, "perennial": perennial.__version__, "preset": preset}
            content["path"] = str(path.absolute())
            atomic.write_json(path / "run.json", content | {"config": config, "environment": environment})
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Look at a run, also while another process writes it.

        Raises:
            PerennialError: it is no run folder, or one of another format.
        """
        run = cls(path)
        if run.header.get("format") != FORMAT or not isinstance(run.header.get("config"), dict):
            raise PerennialError(
                f"{path / 'run.json'} has format {run.header.get('format')}, but this Perennial reads format {FORMAT} "
                "with a config; use the version that wrote it, or restore it from a copy."
            )
        return run

    @classmethod
    def open_locked(cls, path: Path) -> Self:
        """Open a run to go on with it from `latest()`.

        What interrupted writes left behind is removed, and what was logged after the latest commit is forgotten, as
        it will be done again. Timings of evaluated cells stay, because these are not played again.

        Raises:
            PerennialError: it is no run folder, another process writes there, all commits are damaged, or run.json
                was changed after the run began.
        """
        run = cls.open(path)
        run._lock = lock.acquire(path)
        try:
            atomic.clean(path)
            run._rewind()
        except BaseException:
            run.close()
            raise
        return run

    def withdraw(self) -> None:
        """Take back what `create` made, and the folder with it if it is empty then."""
        with contextlib.suppress(OSError):
            for name in ("run.json", ".lock"):
                (self.path / name).unlink()
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @functools.cached_property
    def header(self) -> dict[str, Any]:
        """The content of run.json: format, perennial, preset, path, config, environment.

        In a run that was moved or copied together with what it reads, such as a whole study, the config names what
        lies there now.

        Raises:
            PerennialError: it is missing or damaged.
        """
        path = self.path / "run.json"
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict):
                if isinstance(content.get("config"), dict):
                    content["config"].pop("description", None)  # runs of older versions have one
                found: dict[str, Any] = _found_again(content, content.get("path"), self.path.absolute())
                return found
        except (FileNotFoundError, NotADirectoryError):
            raise PerennialError(
                f"{self.path} is not a run folder: it has no run.json; give the folder of a run, "
                "for example runs/demo-seed0."
            ) from None
        except ValueError:
            pass
        raise PerennialError(f"{path} is damaged: it is not a JSON object; restore it from a copy.")

    def log(self, name: Literal["metrics", "timings"], row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl or timings.jsonl and flush it to the disk.

        Raises:
            PerennialError: a number is NaN or infinite, or the disk does not take the line.
        """
        self._logs[name].append(row)

    def rows(self, name: Literal["metrics", "timings"]) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl or timings.jsonl.

        Raises:
            PerennialError: a line is no JSON.
        """
        return self._logs[name].rows()

    def commit(self, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """Add a commit with the tensors that `write(folder)` saves and the JSON `state`; keep the last two.

        Raises:
            PerennialError: the disk is full or read-only; the former commits are intact.
        """
        number = self._newest + 1
        log_bytes = {name: log.size() for name, log in self._logs.items()}
        full_state = {**state, "log_bytes": log_bytes, "run_sha256": atomic.sha256(self.path / "run.json")}

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / "state.json").write_text(json.dumps(full_state, allow_nan=False), encoding="utf-8")

        atomic.commit_folder(self._commit(number), write_all)
        self._newest = number
        with atomic.explained(self.path / "commits"):
            for old in self._numbers():
                if old <= number - KEPT_COMMITS:
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

    def save_task(self, index: int, name: str, write: Callable[[Path], None]) -> Path:
        """Keep what `write(folder)` saves as the policy after the `index`-th task, counted from 1.

        Raises:
            PerennialError: the disk is full or cannot be written.
        """
        folder = self._task(index, name)
        atomic.commit_folder(folder, write)
        return folder

    def has_task(self, index: int, name: str) -> bool:
        """Whether `save_task` made such a folder, whatever became of it."""
        return self._task(index, name).is_dir()

    def task(self, index: int, name: str) -> Path:
        """The folder that `save_task` made.

        Raises:
            PerennialError: it is missing or damaged.
        """
        atomic.verify(self._task(index, name))
        return self._task(index, name)

    def write_cell(
        self, cell: Cell, successes: Sequence[bool | int], env_steps: Sequence[int], states: int | None = None
    ) -> None:
        """Keep one evaluated cell of the success matrix.

        Args:
            cell: which one.
            successes: of the episodes, in the order of the evaluation initial states.
            env_steps: of the same episodes.
            states: see `Outcome`.

        Raises:
            PerennialError: the disk is full or cannot be written.
        """
        write_cell(self._evaluations, cell, Outcome(tuple(map(int, successes)), tuple(map(int, env_steps)), states))

    def cell(self, cell: Cell) -> Outcome | None:
        """The outcome of one cell; None if it was not evaluated or its file is damaged."""
        return read_cell(self._evaluations, cell)

    def has_cell(self, cell: Cell) -> bool:
        """Whether the cell was evaluated and its file is whole."""
        return self.cell(cell) is not None

    def cells(self) -> dict[Cell, Outcome]:
        """All cells whose files are whole, ordered by path."""
        return dict(read_cells(self._evaluations))

    @staticmethod
    def free_path(name: str, root: Path = Path("runs")) -> Path:
        """The first of `runs/NAME`, `runs/NAME-2`, `runs/NAME-3` and so on that does not exist."""
        path, number = root / name, 1
        while path.exists():
            number += 1
            path = root / f"{name}-{number}"
        return path

    def _rewind(self) -> None:
        """Cut both logs back to the latest commit."""
        commit = self.latest()
        if commit is not None and commit.state["run_sha256"] != atomic.sha256(self.path / "run.json"):
            raise PerennialError(
                f"{self.path / 'run.json'} was changed after the run began, so going on would mix two experiments; "
                "undo the change or start a new run."
            )
        self._newest = commit.number if commit else 0
        sizes = commit.state["log_bytes"] if commit else dict.fromkeys(self._logs, 0)
        self._logs["metrics"].rewind(sizes["metrics"])
        evaluated = [{"event": "evaluation", **asdict(cell)}.items() for cell in self.cells()]
        self._logs["timings"].rewind(sizes["timings"], keep=lambda row: any(cell <= row.items() for cell in evaluated))

    @property
    def _evaluations(self) -> Path:
        return self.path / "evaluations"

    def _task(self, index: int, name: str) -> Path:
        return self.path / "tasks" / f"{index:02d}-{name}"

    def _commit(self, number: int) -> Path:
        return self.path / "commits" / f"{number:06d}"

    def _numbers(self) -> list[int]:
        """Numbers of the commit folders, whole or not, ascending."""
        return sorted(int(folder.name) for folder in (self.path / "commits").glob("[0-9]*") if folder.name.isdigit())


def _found_again(value: Any, begun: str | None, here: Path) -> Any:
    """`value` with paths that lie from the run's place `here` as they lay from the one where it had `begun`."""
    if begun in (None, str(here)):
        return value
    if isinstance(value, dict):
        return {key: _found_again(item, begun, here) for key, item in value.items()}
    if isinstance(value, list):
        return [_found_again(item, begun, here) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        moved = os.path.normpath(here / os.path.relpath(value, begun))
        return moved if Path(moved).exists() else value
    return value
