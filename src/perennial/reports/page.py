"""The report of one run as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from perennial.errors import PerennialError
from perennial.evaluation.statistics import wilson
from perennial.reports import merging, plots, words
from perennial.reports.record import Record, read
from perennial.reports.summary import percent, report
from perennial.storage import atomic

PARTS = {
    "rollout": "Playing training episodes",
    "update": "Learning",
    "evaluation": "Evaluation",
    "commit": "Saving",
    "strategy": "Strategies before and after tasks",
}
VARIANTS = {"ood_val": "shifted versions of the tasks (validation)", "ood_test": "shifted versions of the tasks (test)"}
FEW_KEPT = 0.5
"""A task whose updates used fewer of its decisions than this is worth a warning."""
DIAGNOSTICS = (
    ("kl", "KL divergence from the policy that acted", "nats a token"),
    ("clip_fraction", "Share of clipped probability ratios", "share"),
    ("grad_norm", "Norm of the gradient before clipping", "norm"),
    ("loss", "Loss", "loss"),
    ("penalty", "Penalty of the strategy", "penalty"),
    ("kept", "Share of decisions that were trained on", "share"),
)


def write(folder: Path) -> Path:
    """Write report/index.html and report/report.json of the run in `folder`, each whole or not at all.

    Returns:
        The path of the page.

    Raises:
        PerennialError: `folder` is no run folder.
    """
    record = read(folder)
    figures = report(record)
    path = folder / "report" / "index.html"
    atomic.write_json(path.with_name("report.json"), figures)
    atomic.write_text(path, _render(record, figures))
    return path


def place(out: Path) -> Path:
    """`out`, once it is sure that a page can be written there and its JSON beside it; ask before the work is done.

    Raises:
        PerennialError: it is a folder, it is called like the JSON, or its folder cannot be written.
    """
    if out.is_dir() or not out.name or out.suffix == ".json":
        raise PerennialError(f"--out is {out}, but it must be the file of a page, such as page.html.")
    with atomic.explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            return out


def render(folder: Path) -> str:
    """The report of the run in `folder`, finished or not, as one HTML page without scripts or links to elsewhere."""
    record = read(folder)
    return _render(record, report(record))


def fill(template: str, **values: Any) -> str:
    """Fill one of the templates; everything is escaped but the drawings made by `plots`."""
    loader = PackageLoader("perennial.reports", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        f.__name__: f for f in (words.points, words.rate, words.interval, words.estimate, words.duration)
    }
    style = Markup(loader.get_source(environment, "style.css")[0])
    return environment.get_template(template).render(style=style, metrics=words.METRICS, **values)


def _render(record: Record, figures: Mapping[str, Any]) -> str:
    return fill(
        "report.html.j2",
        name=record.name,
        version=record.run["perennial"],
        report=figures,
        headline=headline(record, figures),
        warnings=warnings(record, figures),
        temperature=record.config["evaluation"]["temperature"],
        maps=[heat_map(record, variant, decoder) for variant, decoder in record.matrices],
        gate=_gate(record),
        merges=merging.merges(record),
        videos=_videos(record),
        curves=_learning_curves(record),
        diagnostics=_diagnostics(record),
        time=_time(record),
        commands=_commands(record),
        environment=[(key, _plain(value)) for key, value in record.run["environment"].items()],
        config=json.dumps(record.config, indent=2, ensure_ascii=False),
    )


def headline(record: Record, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What was learned, what was forgotten and what is still done untaught, as figures and sentences."""
    tasks, done = len(record.trained), record.tasks_done
    taught = words.count(tasks, "task") if record.finished else f"{done} of {words.count(tasks, 'task')}"
    together = "" if tasks == 1 else ", all together" if len(record.phases) < tasks else ", one after another"
    untaught = words.untaught(figures, len(record.held_out))
    return {
        "title": f"{taught} taught{together}",
        "tiles": [
            {
                "title": "Learned",
                "estimate": figures["gain"],
                "sentence": words.learned(figures, done),
                "signed": True,
            },
            {"title": "Forgotten", "estimate": figures["nbt"], "sentence": words.forgotten(figures), "signed": False},
            {"title": "Still done untaught", "estimate": figures["zs_gain"], "sentence": untaught, "signed": True},
        ],
    }


def warnings(record: Record, figures: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    for phase, name in enumerate(record.row_names[1:]):
        lines = [line for line in record.lines(phase) if line.get("kept") is not None]
        silent = [line for line in lines if line["kept"] == 0 or line.get("grad_norm") == 0]
        if silent:
            acted = sum(bool(line.get("grad_norm")) for line in silent)
            effect = f"only the strategies acted, in {acted} of them" if acted else "these iterations changed nothing"
            found.append(
                f"No learning signal in {len(silent)} of {words.count(len(lines), 'iteration')} of {name}: "
                f"all episodes of each group ended alike, so {effect}."
            )
        elif lines and (kept := sum(line["kept"] for line in lines) / len(lines)) < FEW_KEPT:
            found.append(
                f"{name}: on average only {100 * kept:.0f}\u00a0% of the decisions were trained on; "
                "the other groups were dropped because all their episodes ended alike."
            )
    gain = figures["gain"]
    if gain is not None and gain["high"] < 0:
        found.append("Success on the taught tasks is lower than before any teaching.")
    return found


def heat_map(record: Record, variant: str, decoder: str) -> dict[str, Any]:
    """The success matrix as the template draws it: rows of cells with rate, interval and tooltip, in percent."""
    matrix = record.matrices[variant, decoder]
    rows = []
    for row, (name, outcomes) in enumerate(zip(record.row_names, matrix.successes, strict=True)):
        just_taught = record.phases[row - 1] if row else ()
        cells = [
            _heat_cell(task, outcomes.get(task), matrix.states.get(task), task in just_taught) for task in matrix.tasks
        ]
        rows.append({"label": f"after {name}" if row else name, "cells": cells})
    shifted = "" if variant == "id" else f", {VARIANTS.get(variant, variant)}"
    return {
        "title": f"{decoder.capitalize()} decoding{shifted}",
        "decoder": decoder,
        "variant": variant,
        "columns": matrix.tasks,
        "trained": len(matrix.trained),
        "repeated": matrix.repeated,
        "rows": rows,
    }


def _heat_cell(task: str, outcome: np.ndarray | None, states: int | None, just_taught: bool) -> dict[str, Any]:
    if outcome is None:
        return {"just_taught": just_taught, "rate": None}
    estimate = percent(wilson(int(outcome.sum()), len(outcome), states))
    assert estimate is not None
    return shown_rate(task, estimate, just_taught)


def shown_rate(task: str, estimate: Mapping[str, float], just_taught: bool) -> dict[str, Any]:
    """A cell of a heat map: `estimate`, `{value, low, high, n}` in percent, with its tooltip."""
    rate, low, high, episodes = (estimate[key] for key in ("value", "low", "high", "n"))
    title = (
        f"{round(rate * episodes / 100)} of {words.count(int(episodes), 'episode')} of {task}, "
        f"95\u00a0% interval {words.points(low)} to {words.points(high)}\u00a0%"
    )
    return {"just_taught": just_taught, "rate": rate, "low": low, "high": high, "n": episodes, "title": title}


def _gate(record: Record) -> dict[str, Any]:
    """The limit, and which held-out tasks were guarded."""
    settings = record.config.get("gate", {"max_forgetting": None, "held_out": 0})
    return {"max_forgetting": settings["max_forgetting"], "held_out": record.held_out[: settings["held_out"]]}


def _videos(record: Record) -> list[dict[str, Any]]:
    films = []
    for task in (*record.trained, *record.held_out):
        paths = record.videos.get(task, {})
        ends = sorted({min(paths), max(paths)}) if paths else []
        clips = [
            {
                "label": f"After {words.count(sum(map(len, record.phases[:row])), 'task')}" if row else "Before",
                "data": base64.b64encode(paths[row].read_bytes()).decode(),
            }
            for row in ends
        ]
        if clips:
            films.append({"task": task, "held_out": task in record.held_out, "clips": clips})
    return films


def _learning_curves(record: Record) -> list[dict[str, Any]]:
    base = record.matrix(record.decoders[0]).successes[0]
    drawn = []
    for phase, name in enumerate(record.row_names[1:]):
        curve = record.success_curve(phase)
        rates = [float(base[task].mean()) for task in record.phases[phase] if task in base]
        if curve:
            level = sum(rates) / len(rates) if rates else None
            label = f"Success in training on {name} by iteration"
            drawn.append({"title": name, "svg": Markup(plots.success_curve(f"success-{phase}", [curve], label, level))})
    return drawn


def _diagnostics(record: Record) -> list[dict[str, Any]]:
    starts = [
        i
        for i, line in enumerate(record.iterations)
        if i and line["task_index"] != record.iterations[i - 1]["task_index"]
    ]
    drawn = []
    for key, title, unit in DIAGNOSTICS:
        curve = [(float(i), line[key]) for i, line in enumerate(record.iterations) if line.get(key) is not None]
        if any(value for _, value in curve):
            svg = plots.quantity_curve(key.replace("_", "-"), curve, f"{title} by iteration", unit, starts)
            drawn.append({"title": title, "svg": Markup(svg)})
    return drawn


def _time(record: Record) -> dict[str, Any]:
    seconds = dict.fromkeys(PARTS, 0.0)
    for line in record.timings:
        for part in PARTS:
            seconds[part] += line.get(f"{part}_seconds", 0.0)
        if line.get("event") in ("evaluation", "strategy"):
            seconds[line["event"]] += line["seconds"]
    strategies = [line for line in record.timings if line.get("event") == "strategy"]
    if not strategies:  # an older version did not measure them
        del seconds["strategy"]
    total = sum(seconds.values())
    steps = sum(line.get("env_steps", 0) for line in (*record.iterations, *record.timings))
    playing = seconds["rollout"] + seconds["evaluation"]
    return {
        "total": total,
        "parts": [
            {"name": PARTS[p], "seconds": s, "share": 100 * s / total if total else 0} for p, s in seconds.items()
        ],
        "env_steps": steps,
        "speed": (steps - sum(line["env_steps"] for line in strategies)) / playing if playing else 0.0,
    }


def _commands(record: Record) -> list[tuple[str, str]]:
    run = shlex.quote(record.name)
    resume = [] if record.finished else [(f"perennial resume {run}", "go on where it stopped")]
    return [
        *resume,
        (f"perennial evaluate {run}", "evaluate it again, or more thoroughly"),
        (f"perennial compare {run} OTHER_RUN", "set it beside another run"),
        (f"perennial mechanism {run}", "what learning did to its weights"),
        (f"perennial report {run} --json", "the same figures for a program"),
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
