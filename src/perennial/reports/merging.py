"""What a report says of `retain`: which coefficients it took, what it tried, and how much is left of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from perennial.evaluation.statistics import wilson
from perennial.policies._groups import GROUPS
from perennial.reports import plots, words
from perennial.reports.record import Record
from perennial.reports.summary import percent
from perennial.strategies.retain import shares


def merges(record: Record) -> list[dict[str, Any]]:
    """One entry a task: `task`, `alpha` in words, `shares` of base and tasks in words, and the search, if any.

    Where a gate carried on a part of what the merge changed, shares are those of that part.

    A search has `tried` (`alpha` in words, `estimate`, `dropped`), and `curve`, a drawing, where alpha is common to all
    groups, else "".
    """
    carried = {row["task_index"]: row["kept"] for row in record.gates}
    chain = next((strategy["chain"] for strategy in record.config["strategies"] if strategy["name"] == "retain"), "")
    told: list[dict[str, Any]] = []
    merged: dict[str, list[float]] = {}
    for row in record.accounts:
        if row["strategy"] != "retain":
            continue
        scale = carried.get(row["task_index"], 1.0)
        merged[row["task"]] = [scale * row["alpha"][group] for group in GROUPS]
        told.append(
            {
                "task": row["task"],
                "alpha": words.coefficients(row["alpha"]),
                "shares": _shares(shares(merged, chain)),
                "tried": [_tried(trial) for trial in row["tried"]],
                "curve": _curve(f"alpha{row['task_index']}", row["task"], row["tried"]),
            }
        )
    return told


def _shares(by_group: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Base and tasks, each with its share in percent."""
    names = next(iter(by_group.values()))
    return [
        (name, words.coefficients({group: round(100 * of[name], 1) for group, of in by_group.items()}))
        for name in names
    ]


def _tried(trial: Mapping[str, Any]) -> dict[str, Any]:
    estimate = percent(wilson(trial["successes"], trial["episodes"]))
    return {"alpha": words.coefficients(trial["alpha"]), "estimate": estimate, "dropped": trial["dropped"]}


def _curve(name: str, task: str, tried: Sequence[Mapping[str, Any]]) -> Markup | str:
    """Success by alpha with 95 % intervals."""
    if not tried or any(len(set(trial["alpha"].values())) > 1 for trial in tried):
        return ""
    estimates = [percent(wilson(trial["successes"], trial["episodes"])) for trial in tried]
    alphas = [trial["alpha"]["language"] for trial in tried]
    curve = [(alpha, e["value"]) for alpha, e in zip(alphas, estimates, strict=True) if e]
    band = [(e["low"], e["high"]) for e in estimates if e]
    return Markup(plots.lines(name, [curve], f"Success by alpha, {task}", "alpha", "success, %", [band], (-3, 103)))
