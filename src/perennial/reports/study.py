"""A study on one page: every method with intervals over seeds, beside the reference, published numbers and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from perennial import __version__
from perennial.errors import PerennialError
from perennial.evaluation.statistics import mean_difference, summary_of_runs
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports import page, plots, protocol, words
from perennial.reports.summary import estimates_table, percent
from perennial.storage import atomic
from perennial.studies import base
from perennial.studies._results import COSTS, Result, has, load, path, study_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Results = Mapping[int, Result]
"""Seed -> result of one row of the study's tables."""
COST_COLUMNS = (
    ("Playing", "rollout_seconds", words.duration),
    ("Learning", "update_seconds", words.duration),
    ("Strategies", "strategy_seconds", words.duration),
    ("Evaluation", "evaluation_seconds", words.duration),
    ("Training steps", "train_env_steps", "{:,.0f}".format),
    ("Steps for strategies", "strategy_env_steps", "{:,.0f}".format),
    ("Peak memory", "peak_bytes", lambda size: f"{size / 1e9:.2f} GB"),
    ("Kept", "kept_bytes", lambda size: f"{size / 1e6:.2f} MB"),
)
SHORT = {"avg": "AVG", "gain": "Gain", "nbt": "NBT", "fwt": "FWT", "zs": "ZS", "zs_gain": "ZS gain"}


def command(folder: Path, as_json: bool, console: Console) -> None:
    """Write index.html, report.json and table.md of the study into its folder `report` and print its tables.

    With `as_json` only print JSON.

    Raises:
        PerennialError: the folder holds no study or no result, or a result is damaged.
    """
    found = figures(folder)
    if as_json:
        print(json.dumps(found))
        return
    target = folder / "report" / "index.html"
    atomic.write_json(target.with_name("report.json"), found)
    atomic.write_text(target.with_name("table.md"), markdown(found))
    atomic.write_text(target, _render(found))
    if found["protocol"]:
        console.print(protocol.table(found["protocol"], found["description"]))
    for decoder in found["decoders"]:
        console.print(_table(found, decoder))
    console.print(f"Report: {target}", highlight=False, soft_wrap=True)


def figures(folder: Path) -> dict[str, Any]:
    """What `perennial report STUDY --json` prints.

    Returns:
        `study`, `description`, `preset`, `reference`, `source`, `decoders`, `environments` (the machines that results
        were made on), `missing` (runs without a result), `protocol` (see `reports.protocol.figures`), and
        `rows`, one for each method and order with a result: `row`, `section`, `seeds`, `overrides`, `commands`,
        `published` (metric -> percentage points), `published_form` (how what they belong to differs, or ""), `cost`
        (see `studies._results.COSTS`; medians over the seeds where it is known, None where it is for none) and
        `decoders`, which has for each decoder the metrics over seeds, `versus` (their difference to the reference on
        common seeds; None for the reference itself) and `forgetting`, the points lost on average on earlier tasks
        after each task. Metrics are `{value, low, high, n}` in percentage points or None;
        n counts seeds, or evaluation episodes where there is one seed.
    """
    name = study_name(folder)
    study = base.find(name)
    results = read_results(folder, study)
    if not results:
        raise PerennialError(f"The study in {folder} has no result yet; run it by `perennial study {name}`.")
    entries = {entry.row: entry for entry in base.grid(study)}
    one = next(iter(next(iter(results.values())).values()))
    return {
        "study": name,
        "description": study.description,
        "preset": study.preset,
        "reference": study.reference,
        "source": study.source,
        "decoders": [decoder for variant, decoder in one.matrices if variant == next(iter(one.matrices))[0]],
        "environments": _environments(results),
        "missing": [e.name for e in base.grid(study) if e.seed not in results.get(e.row, {})],
        "protocol": protocol.figures(study, results),
        "rows": [_row(entries[row], results[row], _reference(entries[row], results)) for row in results],
    }


def read_results(folder: Path, study: base.Study) -> dict[str, dict[int, Result]]:
    """Row -> seed -> result, in the study's order; results that the study does not know are left out."""
    found: dict[str, dict[int, Result]] = {}
    for entry in base.grid(study):
        if has(folder, entry):
            found.setdefault(entry.row, {})[entry.seed] = load(path(folder, entry))
    return found


def _reference(entry: base.Entry, results: Mapping[str, Results]) -> Results:
    """What a row is compared with: the reference in the given order, or in its own where orders teach other tasks."""
    order = f"-{entry.order}" if entry.order in entry.study.pooled else ""
    return results.get(f"{entry.study.reference}{order}", {})


def _environments(results: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Every machine that results were made on, once, as they describe themselves."""
    described = [r.content["environment"] for results_of in results.values() for r in results_of.values()]
    return [json.loads(text) for text in dict.fromkeys(json.dumps(d, sort_keys=True) for d in described)]


def _row(entry: base.Entry, results: Results, reference: Results) -> dict[str, Any]:
    """One line of the tables."""
    method = entry.study.methods[entry.method]
    keys = list(next(iter(results.values())).matrices)
    decoders = {}
    for variant, decoder in [key for key in keys if key[0] == keys[0][0]]:
        own = {seed: result.matrices[variant, decoder] for seed, result in results.items()}
        other = {seed: result.matrices[variant, decoder] for seed, result in reference.items()}
        decoders[decoder] = {
            **{key: percent(value) for key, value in summary_of_runs(list(own.values())).items()},
            "versus": None if results is reference else _versus(own, other),
            "forgetting": _forgetting(list(own.values())),
        }
    return {
        "row": entry.row,
        "section": method.section if entry.order in (base.GIVEN, *entry.study.pooled) else "order of tasks",
        "seeds": list(results),
        "overrides": {key: value for key, value in entry.overrides.items() if key != "seed"},
        "commands": [result.content["command"] for result in results.values()],
        "published": dict(method.published),
        "published_form": method.published_form,
        "cost": {key: _median([r.cost[key] for r in results.values() if key in r.cost]) for key in COSTS},
        "decoders": decoders,
    }


def _median(numbers: Sequence[float]) -> float | None:
    return float(np.median(numbers)) if numbers else None


def _versus(own: Mapping[int, SuccessMatrix], other: Mapping[int, SuccessMatrix]) -> dict[str, Any] | None:
    """The mean difference to the reference on the seeds that both have."""
    common = [seed for seed in own if seed in other]
    if not common:
        return None
    found = mean_difference([(other[seed], own[seed]) for seed in common])
    return {key: percent(value) for key, value in found.items()}


def _forgetting(matrices: Sequence[SuccessMatrix]) -> list[float]:
    """Points lost on average on the tasks taught before, after each task from the second on; empty for joint training.

    After task i this is the mean over j < i of S[j, j] - S[i, j]; its last value is NBT.
    """
    rates = [matrix.rates() for matrix in matrices]
    lost: list[float] = []
    for i in range(2, len(matrices[0].successes)):
        earlier = np.arange(1, i)
        of_runs = [(s[earlier, earlier - 1] - s[i, earlier - 1]).mean() for s in rates]
        lost.append(round(100 * float(np.mean(of_runs)), 2))
    return lost


def _render(found: Mapping[str, Any]) -> str:
    main, rows = found["decoders"][0], found["rows"]
    reference = next((row for row in rows if row["row"] == found["reference"]), None)
    level = reference["decoders"][main]["forgetting"] if reference else []
    curves = []
    for number, row in enumerate(rows):
        lost = row["decoders"][main]["forgetting"]
        if lost:
            pair = [lost] if row is reference or not level else [lost, level]
            title = f"Points lost on earlier tasks under {row['row']}, after each task"
            curves.append({"title": row["row"], "svg": Markup(plots.forgetting_curve(f"lost-{number}", pair, title))})
    points = [
        (row["row"], row["decoders"][main]["gain"], row["decoders"][main]["nbt"])
        for row in rows
        if row["decoders"][main]["gain"] and row["decoders"][main]["nbt"]
    ]
    return page.fill(
        "study.html.j2",
        version=__version__,
        study=found,
        short=SHORT,
        costs=COST_COLUMNS,
        sections=list(dict.fromkeys(row["section"] for row in rows)),
        trade_off=Markup(plots.trade_off("trade-off", points, "Gain in AVG against forgetting, a point a method")),
        curves=curves,
        key=[Markup(plots.key(index)) for index in range(2)],
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The results as Markdown tables: the protocol, then one for each decoder with the difference in AVG."""
    lines = protocol.markdown(found["protocol"], found["reference"]) if found["protocol"] else []
    for decoder in found["decoders"]:
        names = ("method", "seeds", *SHORT.values(), f"AVG minus {found['reference']}")
        lines += [f"{decoder.capitalize()} decoding:", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in found["rows"]:
            figures = row["decoders"][decoder]
            texts = [words.estimate(figures[metric.key], metric.level) for metric in words.METRICS]
            versus = words.estimate((figures["versus"] or {}).get("avg"), False)
            lines.append(f"| {' | '.join((row['row'], str(len(row['seeds'])), *texts, versus))} |")
        lines.append("")
    return "\n".join(lines)


def _table(found: Mapping[str, Any], decoder: str) -> Table:
    title = f"{found['description']}, {decoder}: percentage points with 95 % intervals"
    rows = []
    for row in found["rows"]:
        figures = row["decoders"][decoder]
        texts = [words.estimate(figures[metric.key], metric.level) for metric in words.METRICS]
        rows.append((row["row"], str(len(row["seeds"])), *texts))
    return estimates_table(title, ("method", "n", *SHORT.values()), rows)
