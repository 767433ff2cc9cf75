"""Two or more runs side by side: their metrics, and paired differences on the tasks and states that they share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.markup import escape

from perennial.errors import PerennialError
from perennial.evaluation.statistics import difference
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports import page, plots, words
from perennial.reports.record import Record, read
from perennial.reports.summary import percent, report
from perennial.storage import atomic

if TYPE_CHECKING:
    from rich.console import Console


def command(folders: Sequence[Path], out: Path | None, as_json: bool, console: Console) -> None:
    """Write the page that compares the runs in `folders` with the first one, and print tables or JSON.

    Raises:
        PerennialError: fewer than two runs, one is no run folder, or the runs are on different suites.
    """
    records = _read(folders)
    target = page.place(out or folders[0] / "report" / "compare.html")
    figures = comparison(records)
    atomic.write_text(target, _render(records, figures))
    if as_json:
        print(json.dumps(figures))
        return
    for table in _tables(figures):
        console.print(table)
    console.print(f"Comparison: {escape(str(target))}", highlight=False, soft_wrap=True)


def compare_json(folders: Sequence[Path]) -> dict[str, Any]:
    """What `perennial compare RUN OTHER --json` prints, see `comparison`."""
    return comparison(_read(folders))


def comparison(records: Sequence[Record]) -> dict[str, Any]:
    """The runs beside each other.

    Returns:
        `runs`, a list of what `report_json` gives; `differences`, for each run but the first: `run`, `against` (the
        first), the common tasks `trained` and `held_out`, and `decoders`, which has for each common decoder the
        differences in `avg`, `gain`, `nbt`, `fwt`, `zs` and `zs_gain` on the common tasks and states, and under
        `tasks` the differences in final success; each is `{value, low, high, n}` in percentage points or None.
        `settings` lists what differs between the configurations.
    """
    first = records[0]
    return {
        "runs": [report(record) for record in records],
        "differences": [_difference(first, other) for other in records[1:]],
        "settings": _settings(records),
    }


def _read(folders: Sequence[Path]) -> list[Record]:
    if len(folders) < 2:
        raise PerennialError(
            f"A comparison needs two or more runs, but {len(folders)} was given; name another run folder."
        )
    records = [read(folder) for folder in folders]
    suites = {str(record.config["suite"]): record.name for record in records}
    if len(suites) > 1:
        raise PerennialError(
            f"The runs are on different suites ({', '.join(suites)}), so their tasks are not the same; "
            "compare runs of one suite."
        )
    if len({record.name for record in records}) < len(records):
        records = [replace(r, name=str(folder)) for r, folder in zip(records, folders, strict=True)]
    return records


def _difference(first: Record, other: Record) -> dict[str, Any]:
    """`other` minus `first`, over the tasks that both have been taught so far and those that both hold out."""
    taught = [set(record.trained[: record.tasks_done]) for record in (first, other)]
    started = first.tasks_done and other.tasks_done
    trained = [task for task in first.trained if all(task in tasks for tasks in taught)]
    held_out = [task for task in first.held_out if task in other.held_out and started]
    decoders = {}
    if first.variant == other.variant:
        for decoder in (name for name in first.decoders if name in other.decoders):
            pair = first.so_far(decoder), other.so_far(decoder)
            decoders[decoder] = _differences(*pair, trained, held_out)
    return {"run": other.name, "against": first.name, "trained": trained, "held_out": held_out, "decoders": decoders}


def _differences(
    first: SuccessMatrix | None, other: SuccessMatrix | None, trained: Sequence[str], held_out: Sequence[str]
) -> dict[str, Any]:
    """Differences in the metrics, and task by task in the last row; None where a run has not come that far."""
    if first is None or other is None or not (trained or held_out):
        return dict.fromkeys(metric.key for metric in words.METRICS) | {"tasks": {}}
    metrics = {key: percent(found) for key, found in difference(first, other).items()}
    keys = dict.fromkeys(trained, "avg") | dict.fromkeys(held_out, "zs")
    tasks = {task: percent(difference(_only(first, task), _only(other, task))[key]) for task, key in keys.items()}
    return metrics | {"tasks": tasks}


def _only(matrix: SuccessMatrix, task: str) -> SuccessMatrix:
    episodes = dict(zip(matrix.tasks, matrix.episodes().max(axis=0), strict=True))
    trained, held_out = ([task], []) if task in matrix.trained else ([], [task])
    return matrix.restricted(trained, held_out, episodes)


def _settings(records: Sequence[Record]) -> dict[str, list[str]]:
    """Dotted name -> its value in each run as JSON, where they are not all equal; a dash where a run has none."""
    flat = [dict(_flat(record.config)) for record in records]
    names = dict.fromkeys(name for settings in flat for name in settings)
    table = {name: [settings.get(name, words.DASH) for settings in flat] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [pair for index, item in enumerate(value) for pair in _flat(item, f"{name}.{index}")]
    return [(name, json.dumps(value, ensure_ascii=False))]


def _render(records: Sequence[Record], figures: Mapping[str, Any]) -> str:
    shared = [d for d in records[0].decoders if all(d in record.decoders for record in records)]
    return page.fill(
        "compare.html.j2",
        version=records[0].run["perennial"],
        runs=figures["runs"],
        differences=figures["differences"],
        settings=figures["settings"],
        decoders=shared,
        maps=[_heat_map(record) for record in records],
        key=[Markup(plots.key(index)) for index in range(len(records))],
        curves=_curves(records),
    )


def _heat_map(record: Record) -> dict[str, Any]:
    drawn = page.heat_map(record, record.variant, record.decoders[0])
    return drawn | {"title": f"{record.name}: {drawn['title']}"}


def _curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Learning curves of the phases that two or more runs share by name, one drawing a phase."""
    drawn = []
    for number, name in enumerate(dict.fromkeys(name for record in records for name in record.row_names[1:])):
        curves = [
            record.success_curve(record.row_names.index(name) - 1) if name in record.row_names else []
            for record in records
        ]
        if sum(map(bool, curves)) > 1:
            title = f"Success in training on {name} by iteration, one line a run"
            drawn.append({"title": name, "svg": Markup(plots.success_curve(f"success-{number}", curves, title))})
    return drawn


def _tables(figures: Mapping[str, Any]) -> list[Any]:
    from rich.table import Table

    runs = figures["runs"]
    title = f"Metrics in percentage points, with 95 % intervals, {next(iter(runs[0]['decoders']))}"
    side = Table("metric", *(escape(run["run"]) for run in runs), title=title, title_justify="left")
    for metric in words.METRICS:
        side.add_row(metric.name, *(words.estimate(run[metric.key], metric.level) for run in runs))
    tables = [side]
    for found in figures["differences"]:
        title = f"{found['run']} minus {found['against']}, on the same tasks and initial states"
        table = Table("difference", *found["decoders"], title=escape(title), title_justify="left")
        for metric in words.METRICS:
            values = [decoder[metric.key] for decoder in found["decoders"].values()]
            table.add_row(metric.name, *(words.estimate(value, level=False) for value in values))
        for task in (*found["trained"], *found["held_out"]):
            values = [decoder["tasks"].get(task) for decoder in found["decoders"].values()]
            table.add_row(escape(task), *(words.estimate(value, level=False) for value in values))
        tables.append(table)
    return tables
