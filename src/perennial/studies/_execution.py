"""Runs a study's grid: as many runs at once as there are processor cores, each an ordinary `perennial run` process.

What has a result is skipped, what was interrupted is resumed. On Linux every run has one core to itself, so its numbers
do not depend on how many run beside it, and however a study ends, its runs end with it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

import perennial
from perennial import machine
from perennial.display import ONE_LINE, Remaining
from perennial.doctor import describe_machine
from perennial.errors import PerennialError
from perennial.interrupt import InterruptedRunError
from perennial.reports.record import read
from perennial.storage import atomic, lock
from perennial.storage.atomic import MANIFEST
from perennial.storage.run_folder import RunFolder
from perennial.studies import _results
from perennial.studies.base import FOLDER, Entry, Preparation, Study, without_place

POLL_SECONDS = 1.0


@dataclass
class _Job:
    """A run at work on its own core."""

    entry: Entry
    core: int
    process: subprocess.Popen[bytes]
    bar: TaskID
    resumed: bool


def execute(study: Study, name: str, folder: Path, entries: Sequence[Entry], jobs: int, console: Console) -> None:
    """Make every missing result of `entries`, `jobs` runs at a time (0: one per core); `folder` is absolute.

    Raises:
        PerennialError: the folder is another study's, or some runs failed; the others are finished all the same.
        InterruptedRunError: Ctrl-C; what was under way is committed.
    """
    if jobs < 0:
        raise PerennialError(f"--jobs is {jobs}, but it must be 1 or more, or 0 for one per core.")
    claim(name, folder)
    with lock.acquire(folder):
        missing = [entry for entry in entries if not _results.has(folder, entry)]
        console.print(f"{len(entries) - len(missing)} of {len(entries)} runs of the study are done.", highlight=False)
        _prepare(study, folder, missing, console)
        failed = _work(name, folder, missing, jobs or machine.cores(), console)
    if failed:
        logs = ", ".join(str(_log(folder, entry)) for entry in failed[:3])
        raise PerennialError(
            f"{len(failed)} of {len(missing)} runs failed; read {logs}, and repeat the command to go on with them."
        )


def claim(name: str, folder: Path) -> None:
    """Make `folder` that of the study called `name`, with a study.json.

    Raises:
        PerennialError: it belongs to another study or holds something else.
    """
    header = folder / "study.json"
    if header.exists():
        found = _results.study_name(folder)
        if found != name:
            raise PerennialError(f"{folder} holds the study {found!r}, not {name!r}; choose another folder.")
        return
    # Killed before study.json was complete, a study leaves these two behind, and has not begun.
    names = [child.name for child in folder.iterdir()] if folder.exists() else []
    if not all(name == ".lock" or name.startswith(".study.json.") for name in names):
        raise PerennialError(f"The folder {folder} is not empty and holds no study; choose another folder.")
    atomic.write_json(
        header, {"study": name, "perennial": perennial.__version__, "environment": dict(describe_machine())}
    )


def _prepare(study: Study, folder: Path, missing: Sequence[Entry], console: Console) -> None:
    """Make what the missing runs need beforehand."""
    methods = {entry.method for entry in missing}
    for preparation in study.preparations:
        needed = methods if preparation.needed_by == ("*",) else methods.intersection(preparation.needed_by)
        if not needed or _is_prepared(folder, preparation):
            continue
        arguments = [part.replace(FOLDER, str(folder)) for part in preparation.arguments]
        console.print(f"Preparing {preparation.path}", highlight=False)
        command = [sys.executable, "-m", "perennial", *arguments]
        if subprocess.run(command, check=False, preexec_fn=machine.end_with_parent).returncode:
            raise PerennialError(
                f"Preparing {preparation.path} failed; see above, and repeat the command to try again."
            )
        atomic.write_json(_record(folder, preparation), {"arguments": list(preparation.arguments)})


def _is_prepared(folder: Path, preparation: Preparation) -> bool:
    """Whether it was made, by the same command as far as that was written down.

    Raises:
        PerennialError: it was made by another command.
    """
    if not (folder / preparation.path / MANIFEST).exists():
        return False
    record = _record(folder, preparation)
    made_by = json.loads(record.read_text())["arguments"] if record.exists() else list(preparation.arguments)
    if made_by != list(preparation.arguments):
        raise PerennialError(
            f"{folder / preparation.path} was made by `perennial {shlex.join(made_by)}`, but the study now asks for "
            f"`perennial {shlex.join(preparation.arguments)}`; delete it to make it again, or choose another folder."
        )
    return True


def _record(folder: Path, preparation: Preparation) -> Path:
    """Where the command is written down."""
    return folder / f"{preparation.path}.prepared.json"


def _work(name: str, folder: Path, missing: Sequence[Entry], jobs: int, console: Console) -> list[Entry]:
    """Run all of `missing`; returns those that failed."""
    waiting, working, failed = list(missing), list[_Job](), list[Entry]()
    cores = machine.core_numbers()[:jobs]
    progress = _progress(console)
    total = progress.add_task("study", total=len(missing), before=0, completed=0)
    done = 0
    with progress, _stopping(working):
        while waiting or working:
            for core in cores:
                if waiting and core not in [job.core for job in working]:
                    working.append(_start(folder, waiting.pop(0), core, progress))
            time.sleep(POLL_SECONDS)
            for job in list(working):
                status, peak = _finished(job)
                if status is not None:
                    working.remove(job)
                    progress.remove_task(job.bar)
                    done += 1
                    if status == 0:
                        _results.write(folder, job.entry, name, None if job.resumed else peak)
                    else:
                        failed.append(job.entry)
                    word = "done" if status == 0 else f"[red]failed[/red], see {escape(str(_log(folder, job.entry)))}"
                    progress.console.print(f"{escape(job.entry.name)}  {word}", highlight=False)
                else:
                    progress.update(job.bar, completed=_share(folder, job.entry))
            underway = sum(progress.tasks[progress.task_ids.index(job.bar)].completed for job in working)
            progress.update(total, completed=done + underway)
    return failed


def _start(folder: Path, entry: Entry, core: int, progress: Progress) -> _Job:
    """Begin or resume a run on one core."""
    run = folder / "runs" / entry.name
    resumed = (run / "run.json").exists()
    if resumed:
        _check_same(run, folder, entry)
        arguments = ["resume", str(run)]
    else:
        arguments = entry.arguments(folder)
    path = _log(folder, entry)
    with atomic.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
    with log, machine.pinned(core):  # workers and threads of a run are counted by it
        process = subprocess.Popen(
            [sys.executable, "-m", "perennial", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
            preexec_fn=machine.end_with_parent,  # so that repeating the command finds no run still at work
        )
    bar = progress.add_task(escape(entry.name), total=1.0, completed=0, before=0.0)
    return _Job(entry, core, process, bar, resumed)


def _check_same(run: Path, folder: Path, entry: Entry) -> None:
    """See that the unfinished run in `run` is the one that `entry` stands for."""
    if not entry.matches(without_place(RunFolder.open(run).header["config"], folder)):
        raise PerennialError(
            f"The run in {run} was started with other settings than {entry.name!r} has in this study; "
            "move it away to start it again."
        )


def _finished(job: _Job) -> tuple[int | None, int]:
    """The exit status of a run and its peak resident set in bytes; None while it works."""
    pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
    if pid == 0:
        return None, 0
    job.process.returncode = os.waitstatus_to_exitcode(status)
    return job.process.returncode, machine.peak_bytes(usage)


def _share(folder: Path, entry: Entry) -> float:
    """How much of a run is done, in [0, 1], by its committed iterations and evaluations."""
    run = folder / "runs" / entry.name
    if not (run / "run.json").exists():
        return 0.0
    record = read(run)
    iterations: int = sum(stage["iterations"] for stage in record.config["recipe"]) * len(record.trained)
    cells: int = sum(matrix.episodes().size for matrix in record.matrices.values())
    played: int = sum(int((matrix.episodes() > 0).sum()) for matrix in record.matrices.values())
    return 0.6 * len(record.iterations) / iterations + 0.4 * played / cells


@contextmanager
def _stopping(working: list[_Job]) -> Iterator[None]:
    """Whatever goes wrong, stop every run cleanly and wait for it; an interrupt becomes a sentence."""

    def ask(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    except BaseException as error:
        for job in working:
            job.process.send_signal(signal.SIGTERM)
        for job in working:
            job.process.wait()
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise InterruptedRunError(
            "Stopped with everything committed; repeat the command to go on with the study."
        ) from None
    finally:
        signal.signal(signal.SIGTERM, former)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}", table_column=ONE_LINE),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f} %", table_column=ONE_LINE),
        Remaining(table_column=ONE_LINE),
        console=console,
        disable=not console.is_terminal,
    )


def _log(folder: Path, entry: Entry) -> Path:
    return folder / "runs" / f"{entry.name}.log"
