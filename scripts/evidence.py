"""Write the tables and drawings of the documentation from the result files, so that no figure is copied by hand.

A table stands between `<!-- NAME -->` and `<!-- end -->` in a page; what is written around it is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perennial import discovery
from perennial.alpha.sweep import likeliest
from perennial.evaluation.statistics import student, summary_of_runs
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports import plots, protocol, study, words
from perennial.reports.summary import percent
from perennial.studies import _results
from perennial.studies.base import find, grid
from perennial.studies.retain import BASES

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = (*sorted(EVIDENCE.glob("*.md")), ROOT / "docs" / "strategies.md")
STUDIES = ROOT / "docs" / "results" / "studies"
MARKED = re.compile(r"<!-- (?!end)([a-z0-9_ ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
INK, COLOURS = "#1b2a24", ("#0b7a55", "#b4540a", "#3b5ba5")
Estimate = Mapping[str, float]
"""`{value, low, high}` in percentage points."""


@cache
def figures(name: str) -> dict[str, Any]:
    """What `perennial report` says of the study's results in the documentation."""
    return study.figures(STUDIES / name)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in (header, *rows)]
    return "".join([lines[0], "|---" * len(header) + "|\n", *lines[1:]])


def split_tables(text: str) -> list[str]:
    """The tables of a Markdown text, in order."""
    return [part.rstrip() + "\n" for part in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def done(name: str) -> str:
    """How much of the study there is, and what is missing."""
    missing, runs = figures(name)["missing"], len(grid(find(name)))
    named = f" Missing: {', '.join(f'`{run}`' for run in missing)}." if missing else ""
    return f"{runs - len(missing)} of {runs} runs have a result.{named}\n"


# The strategies, with the strengths that were tried, and what they cost.

PHASES = {
    "rollout_seconds": "playing",
    "update_seconds": "learning",
    "strategy_seconds": "strategies",
    "evaluation_seconds": "evaluation",
}


def strengths(name: str) -> str:
    """Gain and forgetting of each strength, sampled."""
    rows = []
    for row in figures(name)["rows"]:
        found = row["decoders"]["sampled"]
        rows.append([f"`{row['row']}`", *(words.estimate(found[key], False) for key in ("gain", "nbt"))])
    return table(("method", "Gain", "NBT"), rows)


def strategy_costs() -> str:
    """What strategies keep on disk after five tasks."""
    rows = figures("simple_recipe")["rows"]
    kept = {row["row"]: row["cost"]["kept_bytes"] for row in rows if row["row"] in discovery.names("strategies")}
    return table(("strategy", "kept, MB"), [[f"`{name}`", f"{size / 1e6:.1f}"] for name, size in sorted(kept.items())])


def run_costs() -> str:
    """What a run of each row costs: minutes of its fastest seed, and the medians that the study's report has."""
    results = study.read_results(STUDIES / "simple_recipe", find("simple_recipe"))
    rows = []
    for row in figures("simple_recipe")["rows"]:
        costs = [run.cost for run in results[row["row"]].values()]
        fastest = min(costs, key=lambda cost: sum(cost.get(phase, 0) for phase in PHASES))
        minutes = [f"{sum(fastest.get(phase, 0) for phase in PHASES) / 60:.0f}"]
        minutes += [f"{fastest[phase] / 60:.1f}" if phase in fastest else words.DASH for phase in PHASES]
        medians = []
        for key, unit, places in (("train_env_steps", 1e3, 0), ("peak_bytes", 1e9, 1), ("kept_bytes", 1e6, 1)):
            amount = row["cost"][key]
            medians.append(words.DASH if amount is None else f"{amount / unit:,.{places}f}")
        rows.append([row["row"], *minutes, *medians])
    return table(("method", "minutes", *PHASES.values(), "steps, thousands", "memory, GB", "kept, MB"), rows)


# The search for alpha, made outside the study from the weights that its runs left.


@dataclass(frozen=True)
class Sweep:
    """Every alpha of one fine-tuned policy on shifted scenes: those to measure in, and others to choose in."""

    method: str
    task: str
    seed: int
    measured_in: Mapping[str, Any]
    chosen_in: Mapping[str, Any] | None

    def alpha(self, place: int) -> str:
        """The coefficient of a candidate."""
        return f"{self.measured_in['candidates'][place]['alpha']['language']:g}"


@cache
def sweeps() -> tuple[Sweep, ...]:
    """All of them."""
    found = []
    for path in sorted((STUDIES / "retain" / "alpha").glob("*-test.json")):
        method, task, seed = path.stem.removesuffix("-test").split("-")
        other = path.with_name(path.name.replace("-test", "-val"))
        chosen_in = json.loads(other.read_bytes()) if other.exists() else None
        found.append(Sweep(method, task, int(seed.removeprefix("seed")), json.loads(path.read_bytes()), chosen_in))
    return tuple(found)


def mean_rate(groups: Sequence[Sequence[Estimate]]) -> Estimate:
    """The mean of groups of as many rates, one for each seed, in percent.

    Its interval is the wider one of two: from Agresti and Coull's variances, and from how the seeds differ.
    """
    rates = [rate for group in groups for rate in group]
    value = sum(rate["value"] for rate in rates) / len(rates)
    variance = 0.0
    for rate in rates:
        p = (rate["value"] / 100 * rate["n"] + 2) / (rate["n"] + 4)
        variance += p * (1 - p) / (rate["n"] + 4) / len(rates) ** 2
    margin = max(100 * 1.96 * variance**0.5, student([[rate["value"] for rate in group] for group in groups]))
    return {"value": value, "low": max(0.0, value - margin), "high": min(100.0, value + margin)}


def measured(method: str, what: str, seeds: Sequence[int], rule: Callable[[Sweep], int]) -> Estimate:
    """Success in `ood_test` ("target") or on old tasks ("generalist") with the candidates that a rule takes."""
    by_task: dict[str, list[Estimate]] = {}
    for sweep in sweeps():
        if sweep.method == method and sweep.seed in seeds:
            by_task.setdefault(sweep.task, []).append(sweep.measured_in["candidates"][rule(sweep)][what])
    return mean_rate(list(by_task.values()))


COLUMNS = [(method, what) for method in ("task_ft", "co_ft", "language") for what in ("target", "generalist")]
LABELS = {"language": "task_ft, language alone"}
HEADER = [
    f"{LABELS.get(method, method)}: {'`ood_test`' if what == 'target' else 'old tasks'}" for method, what in COLUMNS
]


def seeds_swept() -> list[int]:
    """Seeds with a sweep."""
    return sorted({sweep.seed for sweep in sweeps()})


def sweep_curve(place: int, method: str, what: str) -> Estimate:
    """One point of the curve over alpha."""
    return measured(method, what, seeds_swept(), lambda sweep: place)


def sweep_table() -> str:
    """Success over alpha."""
    count = len(sweeps()[0].measured_in["candidates"])
    return table(
        ("alpha", *HEADER),
        [
            [sweeps()[0].alpha(i), *(words.estimate(sweep_curve(i, *column), True) for column in COLUMNS)]
            for i in range(count)
        ],
    )


def place_of(alpha: float, sweep: Sweep) -> int:
    """The candidate nearest to `alpha`."""
    alphas = [candidate["alpha"]["language"] for candidate in sweep.measured_in["candidates"]]
    return min(range(len(alphas)), key=lambda i: abs(alphas[i] - alpha))


def searched(sweep: Sweep) -> int:
    """What the strategy `retain` took in the study, looking at the new task alone."""
    result = STUDIES / "retain" / "results" / f"retain_{sweep.method}-{sweep.task}" / f"seed{sweep.seed}.json"
    taken = json.loads(result.read_bytes())["accounts"][0]["alpha"]["language"]
    return place_of(taken, sweep)


def without_rollouts(sweep: Sweep) -> int:
    """The least sum of losses."""
    assert sweep.chosen_in is not None
    candidates = sweep.chosen_in["candidates"]
    return likeliest(*([candidate[loss] for candidate in candidates] for loss in ("target_loss", "base_loss")))


RULES: dict[str, Callable[[Sweep], int]] = {
    "no merging (1)": partial(place_of, 1),
    "the paper (0.8)": partial(place_of, 0.8),
    "search on `ood_val`, new task alone": searched,
    "search on `ood_val` and old tasks": lambda sweep: int((sweep.chosen_in or {})["best"]),
    "least sum of losses, no rollouts": without_rollouts,
}


def choice_table(seeds: Sequence[int]) -> str:
    """What each way to choose alpha takes, and what that is worth where nothing was chosen."""
    rows = []
    for name, rule in RULES.items():
        taken = [
            ", ".join(s.alpha(rule(s)) for s in sweeps() if s.method == method and s.seed in seeds)
            for method in ("task_ft", "co_ft")
        ]
        worth = (words.estimate(measured(*column, seeds, rule), True) for column in COLUMNS[:4])
        rows.append([name, *taken, *worth])
    return table(("alpha chosen by", "task_ft: alphas", "co_ft: alphas", *HEADER[:4]), rows)


# What else the study of RETAIN asks.


def protocol_rows() -> dict[str, Any]:
    """Method -> its row of the protocol."""
    return {row["method"]: row for row in figures("retain")["protocol"]["rows"]}


def difference(method: str, reference: str) -> dict[str, Estimate]:
    """Column of the protocol -> `method` minus `reference` on common seeds and states."""
    whole = find("retain")
    pair = replace(whole, reference=reference, methods={name: whole.methods[name] for name in (reference, method)})
    found = protocol.figures(pair, study.read_results(STUDIES / "retain", pair))
    assert found is not None
    versus: dict[str, Estimate] = next(row["versus"] for row in found["rows"] if row["method"] == method)
    return versus


def growth_table() -> str:
    """How far fine-tuning reaches from bases of 10, 25 and 42 tasks, and what merging adds to it."""
    rows = []
    columns = ("narrow", "ood_test", protocol.GENERALIST)
    for tasks in BASES:
        suffix = "" if tasks == max(BASES) else f"_{tasks}_tasks"
        for method in ("task_ft", "retain_task_ft"):
            found = protocol_rows()[method + suffix]
            cells = [words.estimate(found["figures"][c], True) for c in columns]
            rows.append([str(tasks), method, str(found["runs"]), words.estimate(found["before"], True), *cells])
        added = difference(f"retain_task_ft{suffix}", f"task_ft{suffix}")
        rows.append([str(tasks), "difference", rows[-1][2], "", *(words.estimate(added[c], False) for c in columns)])
    header = ("tasks of the base", "method", "runs", "old tasks before", "`narrow`", "`ood_test`", "old tasks after")
    return table(header, rows)


LENGTHS = (2, 5, 10)
LEVELS = (True, False, True, True)
"""Whether a column of the sequences is a rate; else it is a difference."""


def shortened(whole: SuccessMatrix, length: int) -> SuccessMatrix:
    """What a run of the first `length` tasks would have shown."""
    return replace(whole, trained=whole.trained[:length], successes=whole.successes[: length + 1])


def sequence_table() -> str:
    """What is left of taught and old tasks after 2, 5 and 10 merges in a row."""
    folder, rows = STUDIES / "retain_sequence", []
    entries = [entry for entry in grid(find("retain_sequence")) if _results.has(folder, entry)]
    for method in dict.fromkeys(entry.method for entry in entries):
        found = [_results.load(_results.path(folder, entry)) for entry in entries if entry.method == method]
        for length in LENGTHS:
            taught, shifted = (
                summary_of_runs([shortened(result.matrices[variant, "sampled"], length) for result in found])
                for variant in ("id", "ood_test")
            )
            shown = (taught["avg"], taught["nbt"], shifted["avg"], taught["zs"])
            cells = [words.estimate(percent(one), level) for one, level in zip(shown, LEVELS, strict=True)]
            rows.append([method, str(len(found)), str(length), *cells])
    return table(("method", "runs", "tasks", "taught, `id`", "NBT", "taught, `ood_test`", "old tasks"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "strategy costs": strategy_costs,
    "simple recipe costs": run_costs,
    "strategy strengths done": lambda: done("strategy_strength"),
    "simple recipe done": lambda: done("simple_recipe"),
    "simple recipe sampled": lambda: split_tables(study.markdown(figures("simple_recipe")))[0],
    "simple recipe greedy": lambda: split_tables(study.markdown(figures("simple_recipe")))[1],
    "strategy strengths": lambda: strengths("strategy_strength"),
    "retain done": lambda: done("retain"),
    "retain protocol": lambda: split_tables(study.markdown(figures("retain")))[0],
    "retain minus": lambda: split_tables(study.markdown(figures("retain")))[1],
    "retain sweep": sweep_table,
    "retain choice found": lambda: choice_table([0]),
    "retain choice fresh": lambda: choice_table([1, 2]),
    "retain growth": growth_table,
    "retain sequence done": lambda: done("retain_sequence"),
    "retain sequence": sequence_table,
}


def filled(page: str) -> str:
    """The text of a page with its tables made anew."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end -->", page)


# Drawings.


def draw(name: str, size: tuple[float, float], x: str, y: str, paint: Callable[[Any], None]) -> None:
    """One PNG with a white ground."""
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#c9d2cd", linewidth=0.5, alpha=0.6)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    paint(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(EVIDENCE / f"{name}.png", metadata={"Software": None})


def line(axes: Any, xs: Sequence[float], ys: Sequence[Estimate], label: str, index: int, dashes: str = "-") -> None:
    """A curve with its 95 % intervals as a shade."""
    axes.plot(xs, [y["value"] for y in ys], dashes, color=COLOURS[index], marker="o", markersize=4, label=label)
    axes.fill_between(xs, [y["low"] for y in ys], [y["high"] for y in ys], color=COLOURS[index], alpha=0.12, lw=0)


def alpha_curve(axes: Any) -> None:
    """Both sides of merging."""
    places = range(len(sweeps()[0].measured_in["candidates"]))
    for index, (column, label) in enumerate(zip(COLUMNS, HEADER, strict=True)):
        xs = [float(sweeps()[0].alpha(place)) for place in places]
        points = [sweep_curve(place, *column) for place in places]
        line(axes, xs, points, label.replace("`", ""), index // 2, "-" if column[1] == "target" else "--")
    axes.set_ylim(0, 100)


def overfitting_curve(axes: Any) -> None:
    """Longer and longer fine-tuning."""
    steps = {20: "task_ft_20_steps", 60: "task_ft_60_steps", 200: "task_ft", 600: "task_ft_600_steps"}
    for index, (column, label) in enumerate(
        {"narrow": "as taught", "ood_test": "ood_test", protocol.GENERALIST: "ten old tasks"}.items()
    ):
        line(axes, list(steps), [protocol_rows()[m]["figures"][column] for m in steps.values()], label, index)
    axes.set_xscale("log")
    axes.set_xticks(list(steps), [str(step) for step in steps])
    axes.minorticks_off()
    axes.set_ylim(0, 100)


def trade_off(axes: Any) -> None:
    """Gain across, change of what was never taught upwards."""
    points = []
    for row in figures("simple_recipe")["rows"]:
        found = row["decoders"]["sampled"]
        x, y = found["gain"]["value"], found["zs_gain"]["value"]
        axes.plot(x, y, "o", color=COLOURS[0], markersize=5)
        points.append((row["row"], x, y))
    plots.name_points(axes, points, 7)


def main() -> None:
    """Write everything."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw("trade-off", (7.4, 4.6), "gain on what was taught, points", "gain on what was not, points", trade_off)
    draw("alpha", (6, 3.6), "alpha: 0 is the base, 1 what was fine-tuned", "success, %", alpha_curve)
    draw("overfitting", (6, 3.6), "gradient steps", "success, %", overfitting_curve)


if __name__ == "__main__":
    main()
