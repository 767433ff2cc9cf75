"""`perennial demos`: checks the request, records, and shows progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from perennial import discovery, machine
from perennial.demonstrations.dataset import succeeded
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.suites.base import Suite, require_known

if TYPE_CHECKING:
    from perennial.commands import Demos


def record(options: Demos, console: Console) -> None:
    """Record `options.count` demonstrations of each task into `options.out`.

    Raises:
        PerennialError: an unknown task, a number out of range, or see `record_all`.
    """
    suite = discovery.find("suites", options.suite, Suite)()
    for name, least in (("count", 1), ("first", 0), ("image_size", 1), ("image_every", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise PerennialError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}."
            )
    tasks = options.tasks or tuple(suite.tasks)
    require_known(suite, options.suite, tasks, [options.variant])
    workers = options.workers or machine.cores()
    columns = ("recording", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    failed = 0

    def recorded(path: Path) -> None:
        nonlocal failed
        failed += not succeeded(path)
        progress.advance(bar)

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("recording", total=len(tasks) * options.count)
        record_all(
            options.suite,
            tasks,
            options.count,
            options.out,
            workers,
            recorded,
            Settings(options.variant, options.image_size, options.image_every),
            options.first,
        )
    total, place = len(tasks) * options.count, escape(str(options.out))
    console.print(f"{total} demonstrations, {options.count} of each task, are in {place}.", soft_wrap=True)
    if failed:
        console.print(f"[yellow]In {failed} of them the expert failed; nobody learns from these.[/yellow]")
