"""The sentences and number formats of the reports, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Estimate = Mapping[str, float]
"""`{value, low, high, n}` in percentage points, as in `report_json`."""


DASH = "\u2013"
"""Stands for what is undefined or not measured yet."""


@dataclass(frozen=True)
class Metric:
    """A column of the reports: its key in the JSON, and what it says. A level is a rate; the others are differences."""

    key: str
    name: str
    meaning: str
    level: bool = False


METRICS = (
    Metric("avg", "AVG", "average success on the taught tasks, at the end", level=True),
    Metric("gain", "Gain in AVG", "AVG minus the same average before any teaching: what the run has taught"),
    Metric(
        "nbt",
        "NBT, negative backward transfer",
        "how far success on a task fell between the moment it had been taught and the end; above zero is forgetting. "
        "Read it with the gain: a policy that learned nothing forgets nothing",
    ),
    Metric(
        "fwt",
        "FWT, forward transfer",
        "how far success on a task had risen when its turn came, before it was taught",
    ),
    Metric("zs", "ZS, zero-shot", "average success on the tasks that are never taught, at the end", level=True),
    Metric("zs_gain", "Gain in ZS", "ZS minus the same average before any teaching"),
)


def points(value: float, signed: bool = False) -> str:
    """A number of percentage points with one decimal, a true minus sign, and never "-0.0"."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.1f}".replace("-", "\u2212")


def estimate(found: Estimate | None, level: bool) -> str:
    """An estimate with its interval: "+34.3 (+28.1 to +40.5)", a rate without signs, a dash where it is undefined."""
    if found is None:
        return DASH
    value, low, high = (points(found[key], signed=not level) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def duration(seconds: float) -> str:
    """Seconds as people say them: "48 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, thing: str) -> str:
    """A number of things: "1 task", "2 tasks"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def rate(value: float) -> str:
    """A share in percent with at most one decimal: "80", "62.5"."""
    return points(value).removesuffix(".0")


def interval(estimate: Estimate, signed: bool) -> str:
    """Both ends: "95 % interval -1.0 to +4.0"."""
    return f"95\u00a0% interval {points(estimate['low'], signed)} to {points(estimate['high'], signed)}"


def learned(figures: Mapping[str, Any], tasks: int) -> str:
    """What was learned."""
    gain, average = figures["gain"], figures["avg"]
    if gain is None:
        return "No task has been taught and evaluated yet."
    noun = "the task it was taught" if tasks == 1 else f"the {tasks} tasks it was taught"
    return f"Success on {noun} went from {_moved(average, gain)}." + _chance(gain)


def forgotten(figures: Mapping[str, Any]) -> str:
    """What was forgotten; never without a word on whether there was anything to forget."""
    forgetting, gain = figures["nbt"], figures["gain"]
    if forgetting is None:
        return "This is measured when tasks are taught one after another, from the second task on."
    change = _changed(forgetting["value"])
    sentence = f"After a task had been taught, success on it {change} on average by the end."
    if gain is not None and gain["low"] <= 0:
        return sentence + " Little was learned, so there was little to forget."
    return sentence + _chance(forgetting)


def gate(row: Mapping[str, Any]) -> list[str]:
    """What the gate did after a task, from its line in the log: one sentence on the end, then one for each scale."""
    kept = row["kept"]
    end = {1: "kept the whole update", 0: "rolled the update back"}.get(kept, f"kept {kept:g} of the update")
    limit = f"{points(row['max_forgetting']).removesuffix('.0')} points"
    return [f"Gate after {row['task']}: {end}, as the guarded tasks may fall by {limit}."] + [
        f"  {_tried(trial)}" for trial in row["trials"]
    ]


def _tried(trial: Mapping[str, Any]) -> str:
    worst = max(trial["drops"], key=trial["drops"].get)
    basis = "shown" if trial["shown"] else "measured, but not shown,"
    return (
        f"Scale {trial['scale']:g} {'passed' if trial['passed'] else 'failed'}, {basis} after "
        f"{count(trial['pairs'], 'pair')} of episodes: success {_changed(trial['drop'])} on average "
        f"(drop {points(trial['low'], True)} to {points(trial['high'], True)}), on {worst} it "
        f"{_changed(trial['drops'][worst])}."
    )


def _changed(drop: float) -> str:
    return f"{'fell' if drop > 0 else 'rose'} by {points(abs(drop))} points" if round(drop, 1) else "stayed the same"


def coefficients(alpha: Mapping[str, float]) -> str:
    """Coefficients by group in words; one number where they are the same."""
    if len(set(alpha.values())) == 1:
        return f"{alpha['language']:g}"
    return ", ".join(f"{group} {value:g}" for group, value in alpha.items())


def merge(row: Mapping[str, Any]) -> str:
    """What `retain` did after a task, from its line in the log."""
    taken = f"Merged {row['task']} with alpha {coefficients(row['alpha'])}"
    if not row["tried"]:
        return f"{taken}."
    episodes = sum(trial["episodes"] for trial in row["tried"])
    return f"{taken}, the best of {count(len(row['tried']), 'candidate')} in {count(episodes, 'episode')}."


def untaught(figures: Mapping[str, Any], tasks: int) -> str:
    """What is still done untaught."""
    level, gain = figures["zs"], figures["zs_gain"]
    if tasks == 0:
        return "No task was held out, so this was not measured."
    if level is None or gain is None:
        return "Nothing has been taught and evaluated yet."
    noun = "the task it was never taught" if tasks == 1 else f"the {tasks} tasks it was never taught"
    return f"Success on {noun} went from {_moved(level, gain)}." + _chance(gain)


def _moved(level: Estimate, gain: Estimate) -> str:
    return f"{points(level['value'] - gain['value'])}\u00a0% to {points(level['value'])}\u00a0%"


def _chance(estimate: Estimate) -> str:
    return " The interval includes zero: this could be chance." if estimate["low"] <= 0 <= estimate["high"] else ""
