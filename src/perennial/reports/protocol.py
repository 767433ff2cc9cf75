"""The protocol of few-shot fine-tuning: every method on what it was taught, as taught and shifted, and on old tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.table import Table

from perennial.evaluation.statistics import Summary, difference_of_groups, summary_of_groups
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports import words
from perennial.reports.summary import estimates_table, percent
from perennial.studies._results import Result
from perennial.studies.base import Study

GENERALIST = "generalist"
"""The column of the held-out tasks, in the first variant."""

Results = Mapping[str, Mapping[int, Result]]
"""Row of the study's tables -> seed -> result."""
Groups = list[dict[int, SuccessMatrix]]
"""For each choice of taught tasks, seed -> matrix."""


def figures(study: Study, results: Results) -> dict[str, Any] | None:
    """The protocol table; None for a study whose orders are not `pooled`.

    Returns:
        `pooled`: the orders of tasks that a row is the mean over; `columns`: the variants in which taught tasks are
        evaluated, and "generalist" for the held-out tasks; `rows`: `method`, `section`, `runs`, `published` (column ->
        percentage points), `figures` (column -> mean over the orders and seeds, as `{value, low, high, n}` in
        percentage points with n runs), `before`, the figure of "generalist" before teaching, and `versus`, the
        difference to the reference on common seeds. The first row, "base", is what the reference started from.
    """
    if not study.pooled:
        return None
    runs = {method: _runs(study, results, method) for method in study.methods}
    runs = {method: found for method, found in runs.items() if found}
    reference = runs.get(study.reference, [])
    if not reference:
        return None
    first = next(iter(reference[0].values()))
    decoder, variants = next(iter(first.matrices))[1], tuple(dict.fromkeys(variant for variant, _ in first.matrices))

    def row(method: str, section: str, own: list[dict[int, Result]], end: slice, published: Any) -> dict[str, Any]:
        of = {v: [_cut(group, v, decoder, end) for group in own] for v in variants}
        other = {v: [_cut(group, v, decoder, slice(None)) for group in reference] for v in variants}
        before = [_cut(group, variants[0], decoder, slice(1)) for group in own]
        return {
            "method": method,
            "section": section,
            "runs": sum(map(len, own)),
            "published": dict(published),
            "figures": _columns({v: summary_of_groups([list(g.values()) for g in of[v]]) for v in variants}),
            "before": percent(summary_of_groups([list(g.values()) for g in before])["zs"]),
            "versus": None if own is reference and end == slice(None) else _versus(of, other),
        }

    rows = [row("base", "", reference, slice(1), {})]
    rows += [
        row(method, study.methods[method].section, own, slice(None), study.methods[method].published)
        for method, own in runs.items()
    ]
    return {"pooled": list(study.pooled), "columns": [*variants, GENERALIST], "rows": rows}


def _runs(study: Study, results: Results, method: str) -> list[dict[int, Result]]:
    """The method's results for each pooled order, if every order has one."""
    found = [dict(results.get(f"{method}-{order}", {})) for order in study.pooled]
    return found if all(found) else []


def _cut(group: Mapping[int, Result], variant: str, decoder: str, rows: slice) -> dict[int, SuccessMatrix]:
    """Seed -> the success matrix up to some row."""
    of = {seed: result.matrices[variant, decoder] for seed, result in group.items()}
    return {seed: replace(m, successes=m.successes[rows]) for seed, m in of.items()}


def _versus(own: Mapping[str, Groups], other: Mapping[str, Groups]) -> dict[str, Any] | None:
    """Own minus other; None where an order has no common seed."""
    found = {}
    for variant in own:
        pairs = [
            [(theirs[seed], mine[seed]) for seed in mine if seed in theirs]
            for mine, theirs in zip(own[variant], other[variant], strict=True)
        ]
        if not all(pairs):
            return None
        found[variant] = difference_of_groups(pairs)
    return _columns(found)


def _columns(found: Mapping[str, Summary]) -> dict[str, Any]:
    """AVG in every variant, and ZS in the first."""
    first = next(iter(found.values()))
    return {**{variant: percent(one["avg"]) for variant, one in found.items()}, GENERALIST: percent(first["zs"])}


def markdown(found: Mapping[str, Any], reference: str) -> list[str]:
    """Rates, and differences to the reference, as lines of two Markdown tables."""
    lines: list[str] = []
    for title, key, level in (("method", "figures", True), (f"minus {reference}", "versus", False)):
        names = (title, "runs", *found["columns"])
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in found["rows"]:
            if row[key] is not None:
                texts = [words.estimate(row[key][column], level) for column in found["columns"]]
                lines.append(f"| {' | '.join((row['method'], str(row['runs']), *texts))} |")
        lines.append("")
    return lines


def table(found: Mapping[str, Any], title: str) -> Table:
    """Rates for the console."""
    rows = [
        (row["method"], str(row["runs"]), *(words.estimate(row["figures"][c], True) for c in found["columns"]))
        for row in found["rows"]
    ]
    return estimates_table(title, ("method", "runs", *found["columns"]), rows)
