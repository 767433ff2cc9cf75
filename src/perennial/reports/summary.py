"""The numbers of one run, for programs and for the console; the page shows the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perennial.evaluation.statistics import Estimate, summary
from perennial.reports import words
from perennial.reports.record import Record, read

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def report_json(folder: Path) -> dict[str, Any]:
    """What `perennial report RUN --json` prints.

    Returns:
        `run`, `seed`, `preset`, `finished`; then for the main decoder `avg`, `gain`, `nbt`, `fwt`, `zs` and `zs_gain`,
        each `{value, low, high, n}` in percentage points or None where it is undefined; and `matrix` with `rows` (what
        had just been taught), `columns`, `trained` (how many columns are taught; the others are held out), `rates` in
        percent, None where not evaluated, and `n`, the episodes of a cell. `decoders` has the same for each decoder.
        `gates` tells for every task that went through the gate which share of its update was `kept`, and why;
        `accounts` what strategies did after a task, see `Strategy.account`.
        The metrics of an unfinished run are over the tasks that are taught and evaluated so far.

    Raises:
        PerennialError: `folder` is no run folder.
    """
    return report(read(folder))


def report(record: Record) -> dict[str, Any]:
    """`report_json` of a run that is already read."""
    decoders = {decoder: _figures(record, decoder) for decoder in record.decoders}
    return {
        "run": record.name,
        "seed": record.config["seed"],
        "preset": record.run["preset"],
        "finished": record.finished,
        **decoders[record.decoders[0]],
        "decoders": decoders,
        "gates": [{key: value for key, value in row.items() if key != "event"} for row in record.gates],
        "accounts": [{key: value for key, value in row.items() if key != "event"} for row in record.accounts],
    }


def print_summary(folder: Path, console: Console) -> None:
    """Print the metrics and the success matrix of the run in `folder` as tables."""
    from rich.markup import escape

    record = read(folder)
    figures = report(record)
    state = "finished" if figures["finished"] else "not finished"
    console.print(
        f"[bold]{escape(record.name)}[/bold]  preset {escape(figures['preset'])}, seed {figures['seed']}, {state}"
    )
    for sentence in (
        words.learned(figures, record.tasks_done),
        words.forgotten(figures),
        words.untaught(figures, len(record.held_out)),
    ):
        console.print(f"  {sentence}", highlight=False)
    for row in record.gates:
        console.print(f"  {escape(words.gate(row)[0])}", highlight=False)
    for row in record.accounts:
        if row["strategy"] == "retain":
            console.print(f"  {escape(words.merge(row))}", highlight=False)
    console.print(_metrics_table(figures["decoders"]))
    for decoder in record.decoders:
        console.print(_matrix_table(figures["decoders"][decoder]["matrix"], decoder))


def _figures(record: Record, decoder: str) -> dict[str, Any]:
    """The metrics and the matrix under one decoder, in percentage points."""
    matrix, so_far = record.matrix(decoder), record.so_far(decoder)
    estimates = summary(so_far) if so_far else {}
    rates = [[None if np.isnan(rate) else as_percent(rate) for rate in row] for row in matrix.rates()]
    figures: dict[str, Any] = {metric.key: percent(estimates.get(metric.key)) for metric in words.METRICS}
    figures["matrix"] = {
        "rows": list(record.row_names),
        "columns": list(matrix.tasks),
        "trained": len(matrix.trained),
        "rates": rates,
        "n": int(matrix.episodes().max()),
    }
    return figures


def as_percent(share: float) -> float:
    """`share` in percent, without the dust of binary fractions: 27.5, not 27.500000000000004."""
    return round(100 * float(share), 9) + 0.0


def percent(estimate: Estimate | None) -> dict[str, float] | None:
    """`{value, low, high, n}` in percentage points."""
    if estimate is None:
        return None
    value, low, high = map(as_percent, (estimate.value, estimate.low, estimate.high))
    return {"value": value, "low": low, "high": high, "n": estimate.n}


def estimates_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A line a method: its name, its number of runs, and estimates whose intervals stand below them.

    On a narrow terminal an interval takes two lines or three, but is never cut.
    """
    from rich.markup import escape
    from rich.table import Column, Table

    name, runs, *estimates = columns
    table = Table(
        Column(name, no_wrap=True),
        Column(runs, no_wrap=True),
        *(Column(one, min_width=6, overflow="fold") for one in estimates),
        title=escape(title),
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    for method, count, *texts in rows:
        table.add_row(escape(method), count, *(text.replace(" (", "\n(") for text in texts))
    return table


def _metrics_table(decoders: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    title = "Metrics in percentage points, with 95 % intervals"
    table = Table("metric", *decoders, title=title, title_justify="left")
    for metric in words.METRICS:
        table.add_row(
            metric.name, *(words.estimate(figures[metric.key], metric.level) for figures in decoders.values())
        )
    return table


def _matrix_table(matrix: Mapping[str, Any], decoder: str) -> Any:
    """The matrix turned on its side, a task a line, because task names are long and terminals narrow."""
    from rich.markup import escape
    from rich.table import Table

    title = f"Success in %, {decoder}, {matrix['n']} episodes a cell"
    table = Table("task", title=title, title_justify="left")
    for number, _ in enumerate(matrix["rows"]):
        table.add_column(f"after {number}" if number else "base", justify="right")
    for index, (task, rates) in enumerate(zip(matrix["columns"], zip(*matrix["rates"], strict=True), strict=True)):
        taught = index < matrix["trained"]
        label = f"{index + 1} {escape(task)}" if taught else f"{escape(task)}, never taught"
        cells = [words.DASH if rate is None else words.rate(rate) for rate in rates]
        table.add_row(label, *cells, end_section=index + 1 == matrix["trained"])
    return table
