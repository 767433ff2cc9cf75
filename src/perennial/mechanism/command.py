"""`perennial mechanism`: the figures of `measure` as a page, as JSON and on the console."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import perennial
from perennial.errors import PerennialError
from perennial.mechanism.figures import EVERYTHING, measure, scope
from perennial.overrides import fractions
from perennial.reports import page, plots, words
from perennial.storage import atomic

if TYPE_CHECKING:
    from rich.console import Console

    from perennial.commands import Mechanism

SETS = {"taught": "taught tasks", "held_out": "never taught"}


def command(options: Mechanism, console: Console) -> None:
    """Measure a run, write the page and the JSON beside it, and print tables or the JSON.

    Raises:
        PerennialError: the run has learned nothing yet, a task does not exist, or a number is out of range.
    """
    if options.episodes < 1:
        raise PerennialError(f"--episodes is {options.episodes}, but it must be above 0.")
    scales = fractions(options.scales, "--scales")
    chosen = scope(options.run, options.tasks)
    target = page.place(options.out or options.run / "report" / "mechanism.html")
    with Progress(console=console, disable=options.json, transient=True) as progress:
        figures = measure(chosen, scales, options.episodes, progress)
    atomic.write_json(target.with_suffix(".json"), figures)
    atomic.write_text(target, render(figures))
    if options.json:
        print(json.dumps(figures))
        return
    for table in tables(figures):
        console.print(table)
    console.print(f"Mechanism: {escape(str(target))}", highlight=False, soft_wrap=True)


def render(figures: Mapping[str, Any]) -> str:
    """The page, without scripts or links to elsewhere."""
    return page.fill(
        "mechanism.html.j2",
        version=perennial.__version__,
        figures=figures,
        groups=[*figures["groups"], EVERYTHING],
        sets=[(key, name) for key, name in SETS.items() if figures[key]],
        key=[Markup(plots.key(index)) for index in range(len(figures["groups"]) + 1)],
        plots=_plots(figures),
        map=_scale_map(figures),
        number=number,
    )


def number(value: float | None) -> str:
    """Three significant digits, a dash for None."""
    return words.DASH if value is None else f"{value:.3g}"


def _plots(figures: Mapping[str, Any]) -> dict[str, Markup]:
    """The drawings of the page by name."""
    groups = [*figures["groups"], EVERYTHING]
    sets = [key for key in SETS if figures[key]]
    row = "tasks learned" if len(figures["rows"]) == len(figures["taught"]) else "phases learned"

    def along(what: Callable[[Mapping[str, Any], str], float | None], lines: Sequence[str]) -> list[plots.Curve]:
        """One curve a line over the rows, without what is undefined."""
        return [
            [(i, value) for i, r in enumerate(figures["rows"], 1) if (value := what(r, line)) is not None]
            for line in lines
        ]

    drawings = {
        "size": (
            along(lambda r, g: r["update"][g]["relative"], groups),
            "Size of the update",
            "share of the base's norm",
        ),
        "rank": (along(lambda r, g: r["update"][g]["rank"], groups), "Effective rank of the update", "effective rank"),
        "fisher": (along(lambda r, g: r["fisher"][g]["ratio"], groups), "Fisher energy", "energy by the mean F"),
    }
    if figures["rows"][0]["kl"] is not None:
        forward = along(lambda r, s: r["kl"][s]["forward"], sets)
        drawings["kl"] = (forward, "KL divergence from the base to the policy", "nats a token")
    drawn = {n: Markup(plots.lines(n, curves, f"{t} by task", row, unit)) for n, (curves, t, unit) in drawings.items()}
    levels = figures["scales"]
    curves = [[(level["scale"], level[key]["value"]) for level in levels] for key in sets]
    bands = [[(level[key]["low"], level[key]["high"]) for level in levels] for key in sets]
    success = plots.lines(
        "scale", curves, "Success by the scale of the update", "scale", "success, %", bands, (-3, 103)
    )
    return drawn | {"scale": Markup(success)}


def _scale_map(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Success by scale and task, as the report draws a success matrix."""
    columns = [*figures["taught"], *figures["held_out"]]
    rows = [
        {
            "label": f"scale {level['scale']:g}",
            "cells": [page.shown_rate(task, level["tasks"][task], just_taught=False) for task in columns],
        }
        for level in figures["scales"]
    ]
    return {
        "title": "Success by the scale of the update, sampled decoding",
        "decoder": "sampled",
        "variant": "id",
        "columns": columns,
        "trained": len(figures["taught"]),
        "rows": rows,
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The figures for the console."""
    update = Table("after", "group", "norm", "of base", "nuclear", "rank", "matrices", title="Weight update")
    fisher = Table("after", "group", "energy", "by largest F", "by mean F", title="Fisher energy of the update")
    kl = Table("after", "tasks", "KL(base, policy)", "KL(policy, base)", title="Divergence, nats a token")
    for row in figures["rows"]:
        after = escape(row["after"])
        for group in (*figures["groups"], EVERYTHING):
            size, energy = row["update"][group], row["fisher"][group]
            shown = (number(size[key]) for key in ("frobenius", "relative", "nuclear", "rank"))
            update.add_row(after, group, *shown, str(size["matrices"]), end_section=group == EVERYTHING)
            shown = (number(energy[key]) for key in ("energy", "share", "ratio"))
            fisher.add_row(after, group, *shown, end_section=group == EVERYTHING)
        for key, name in SETS.items():
            if row["kl"] is not None and row["kl"][key] is not None:
                kl.add_row(after, name, *(number(row["kl"][key][way]) for way in ("forward", "reverse")))
    sets = [key for key in SETS if figures[key]]
    title = f"Success in % by scale of the update, {figures['episodes']} episodes a task, sampled"
    success = Table("scale", *(SETS[key] for key in sets), title=title)
    for level in figures["scales"]:
        success.add_row(f"{level['scale']:g}", *(words.estimate(level[key], level=True) for key in sets))
    return [update, fisher, *([kl] if kl.row_count else []), success]
