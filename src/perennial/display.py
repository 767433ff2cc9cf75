"""What a person sees while a run works: what is being done, at what rate, and how long it will still take."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from perennial.learning.stage import Iteration

ONE_LINE = Column(no_wrap=True)


class Remaining(ProgressColumn):
    """Time left, from the speed of this session."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        done = task.completed - task.fields["before"]
        if not task.total or done <= 0 or task.elapsed is None:
            return Text("estimating", style="cyan")
        seconds = int((task.total - task.completed) * task.elapsed / done)
        return Text(f"{seconds // 60}:{seconds % 60:02d} left", style="cyan")


class Display:
    """One bar over all episodes of the run, and one line for everything finished."""

    def __init__(self, total: int, before: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=ONE_LINE),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:.0f} %", table_column=ONE_LINE),
            TextColumn("{task.fields[rate]}", table_column=ONE_LINE),
            Remaining(table_column=ONE_LINE),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=total, completed=before, before=before, rate="")
        self._steps, self._since = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """From now on, `what` is being done."""
        self._steps, self._since = 0, time.monotonic()
        self._progress.update(self._bar, description=what, rate="")

    def episode(self, steps: int, success: bool) -> None:
        """An episode of `steps` environment steps has ended."""
        self._steps += steps
        rate = self._steps / max(1e-9, time.monotonic() - self._since)
        self._progress.update(self._bar, advance=1, rate=f"{rate:,.0f} steps/s")

    def iteration(self, what: str, done: Iteration, total: int) -> None:
        """A line about a finished iteration."""
        success = "" if done.success is None else f"success {done.success:4.0%}  "
        figures = "  ".join(f"{k} {done.metrics[k]:.3f}" for k in ("kl", "loss") if k in done.metrics)
        self.say(
            f"{what}  {done.number + 1:>2}/{total}  {success}{figures}  "
            f"[dim]rollout {done.rollout_seconds:.1f} s, update {done.update_seconds:.1f} s[/dim]"
        )

    def say(self, text: str) -> None:
        """A line that stays."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)
