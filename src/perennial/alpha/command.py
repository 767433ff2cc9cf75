"""`perennial alpha`: the sweep as a page, as JSON and on the console, with the command that merges by its choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import perennial
from perennial import discovery
from perennial.alpha.sweep import Pair, Plan, front, likeliest, losses, open_pair, sweep
from perennial.demonstrations.dataset import require_recorded
from perennial.errors import PerennialError
from perennial.evaluation.race import Runner, winner
from perennial.evaluation.statistics import wilson
from perennial.merging.groups import Coefficients, grid
from perennial.overrides import fractions
from perennial.policies._groups import GROUPS
from perennial.policies._placement import check_placement
from perennial.reports import page, plots, words
from perennial.reports.summary import percent
from perennial.rollout.workers import Cast, WorkerConfig
from perennial.storage import atomic
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.suites.base import Suite, require_known

if TYPE_CHECKING:
    from rich.console import Console

    from perennial.alpha.options import Alpha


def command(options: Alpha, console: Console) -> None:
    """Sweep, write the page and the JSON beside it, and print a table and the command to merge with.

    Raises:
        PerennialError: a folder, task, variant or number that cannot be used, or the page exists already.
    """
    candidates, plan, target = _candidates(options), _plan(options), _new_page(options.out)
    base = checkpoint_folder(str(options.base))
    pair = open_pair(options.policy, base, options.finetuned, options.device, options.dtype)
    field = _played(options, pair, plan, candidates, base, console) if plan.episodes else []
    found = _figures(options, plan, candidates, field, _losses(options, pair, candidates))
    atomic.write_json(target.with_suffix(".json"), found)
    atomic.write_text(target, render(found))
    if options.json:
        print(json.dumps(found))
        return
    console.print(_table(found))
    if field and found["without_rollouts"] is not None:
        taken = _words(candidates[found["without_rollouts"]])
        console.print(f"By the demonstrations' losses alone it would be alpha {taken}.", highlight=False)
    console.print(f"Merge with the best one:\n  {escape(found['command'])}", highlight=False, soft_wrap=True)
    console.print(f"Alpha: {escape(str(target))}", highlight=False, soft_wrap=True)


def _played(
    options: Alpha, pair: Pair, plan: Plan, candidates: Sequence[Coefficients], base: Path, console: Console
) -> list[Runner]:
    """The sweep, with a bar over its episodes."""
    with Progress(console=console, disable=options.json, transient=True) as progress:
        most = len(candidates) * plan.episodes * (len(plan.tasks) + len(plan.generalist))
        bar = progress.add_task("playing", total=most)

        def on_episodes(coefficients: Coefficients, count: int) -> None:
            progress.update(bar, advance=count, description=f"playing alpha {_words(coefficients)}")

        cast = Cast(options.suite, options.policy, base, options.seed, options.device, options.dtype)
        return sweep(pair, plan, candidates, cast, WorkerConfig(count=options.workers), on_episodes)


def _new_page(out: Path) -> Path:
    """`out`, checked before anything is played: hours of playing must not overwrite what an earlier sweep found."""
    target = page.place(out)
    for path in (target, target.with_suffix(".json")):
        if path.exists():
            raise PerennialError(f"{path} exists already; name another page by --out, nothing is overwritten.")
    return target


def _candidates(options: Alpha) -> list[Coefficients]:
    """The grid that the options ask for."""
    own = {group: getattr(options, group) for group in GROUPS}
    by_group = {group: fractions(text, f"--alpha.{group}") for group, text in own.items() if text}
    return grid(fractions(options.alpha, "--alpha"), by_group)


def _plan(options: Alpha) -> Plan:
    """What is played, checked before anything is loaded."""
    suite = discovery.find("suites", options.suite, Suite)()
    if not options.tasks:
        raise PerennialError("No task is named; give those that were fine-tuned for, as --tasks drawer-open-v3.")
    require_known(suite, options.suite, (*options.tasks, *options.generalist), [options.variant])
    for name in ("episodes", "temperature", "workers"):
        if getattr(options, name) < 0:
            raise PerennialError(f"--{name} is {getattr(options, name)}, but it must be 0 or more.")
    if not options.episodes and not (options.demonstrations and options.pretraining):
        raise PerennialError(
            "--episodes is 0, so that nothing is played; play at least 1, or give both --demonstrations and "
            "--pretraining, to choose by their losses."
        )
    for task in options.tasks if options.demonstrations else ():
        require_recorded(str(options.demonstrations), "demonstrations", task)
    if options.pretraining:
        require_recorded(str(options.pretraining), "pretraining")
    check_placement(options.device, options.dtype, "--")
    if not 0 <= options.retention <= 1:
        raise PerennialError(f"--retention is {options.retention}, but it is a weight from 0 to 1.")
    played = ((options.tasks, options.variant), (options.generalist, suite.variants[0]))
    fewest = [suite.fewest_states(tasks, "training", variant) for tasks, variant in played]
    episodes = min([options.episodes, *(count for count in fewest if count is not None)])
    chosen = (options.suite, options.tasks, options.variant, options.generalist, episodes)
    return Plan(*chosen, temperature=options.temperature, seed=options.seed)


def _losses(options: Alpha, pair: Pair, candidates: Sequence[Coefficients]) -> dict[str, list[float]]:
    """Losses on demonstrations that were left out of the fine-tuning, and on the base's own data."""
    asked: dict[str, tuple[Path | None, Sequence[str] | None]] = {
        "target": (options.demonstrations, options.tasks),
        "base": (options.pretraining, None),
    }
    return {name: losses(pair, candidates, folder, tasks) for name, (folder, tasks) in asked.items() if folder}


def _figures(
    options: Alpha,
    plan: Plan,
    candidates: Sequence[Coefficients],
    field: Sequence[Runner],
    loss: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Everything that was found, for the JSON file and the page; rates in percent with Wilson 95 % intervals."""
    names = ("target", "generalist")[: len(plan.objectives)] if field else ()
    parts = [[runner.outcomes[:, columns] for columns in plan.objectives] for runner in field]
    weights = (1.0,) if len(names) == 1 else (1 - options.retention, options.retention)

    def score(runner: Runner) -> float:
        of_objectives = zip(weights, plan.objectives, strict=True)
        return sum(weight * float(runner.outcomes[:, columns].mean()) for weight, columns in of_objectives)

    by_losses = likeliest(loss["target"], loss["base"]) if len(loss) == 2 else None
    best = winner(field, score) if field else by_losses
    assert best is not None
    finished = [place for place, runner in enumerate(field) if not runner.dropped]
    on_front = front([(parts[place][0].mean(), parts[place][-1].mean()) for place in finished])
    best_trades = {place for place, undominated in zip(finished, on_front, strict=True) if undominated}
    played = [
        {name: percent(wilson(int(p.sum()), p.size)) for name, p in zip(names, ps, strict=True)}
        | {"dropped": runner.dropped, "front": place in best_trades}
        for place, (runner, ps) in enumerate(zip(field, parts, strict=True))
    ]
    return {
        "base": str(options.base),
        "finetuned": str(options.finetuned),
        "plan": asdict(plan),
        "retention": options.retention if len(names) > 1 else None,
        "candidates": [
            {
                "alpha": dict(zip(GROUPS, coefficients, strict=True)),
                **(played[number] if field else {"dropped": False, "front": False}),
                **{f"{name}_loss": values[number] for name, values in loss.items()},
            }
            for number, coefficients in enumerate(candidates)
        ],
        "best": best,
        "without_rollouts": by_losses,
        "command": _merge_command(options, candidates[best]),
    }


def _merge_command(options: Alpha, coefficients: Coefficients) -> str:
    if len(set(coefficients)) == 1:
        flags = ["--alpha", f"{coefficients[0]:g}"]
    else:
        flags = [part for g, a in zip(GROUPS, coefficients, strict=True) for part in (f"--alpha.{g}", f"{a:g}")]
    return shlex.join(["perennial", "merge", str(options.base), str(options.finetuned), "-o", "merged", *flags])


def _words(coefficients: Coefficients) -> str:
    return words.coefficients(dict(zip(GROUPS, coefficients, strict=True)))


def render(found: Mapping[str, Any]) -> str:
    """The page, without scripts or links to elsewhere."""
    return page.fill(
        "alpha.html.j2",
        version=perennial.__version__,
        found=found,
        names=[name for name in ("target", "generalist") if name in found["candidates"][0]],
        losses=[name for name in ("target_loss", "base_loss") if name in found["candidates"][0]],
        alphas=[words.coefficients(candidate["alpha"]) for candidate in found["candidates"]],
        key=[Markup(plots.key(index)) for index in range(2)],
        plots=_plots(found),
    )


def _plots(found: Mapping[str, Any]) -> dict[str, Markup]:
    """Curves over what varies: a common alpha, or that of one group; where several vary there is only the table."""
    candidates, drawn = found["candidates"], {}
    group = varying([candidate["alpha"] for candidate in candidates])
    if group is None:
        return {}
    alphas, x = [c["alpha"][group or "language"] for c in candidates], f"alpha of {group}" if group else "alpha"
    names = [name for name in ("target", "generalist") if name in candidates[0]]
    if names:
        curves = [[(a, c[name]["value"]) for a, c in zip(alphas, candidates, strict=True)] for name in names]
        bands = [[(c[name]["low"], c[name]["high"]) for c in candidates] for name in names]
        drawn["success"] = plots.lines("success", curves, f"Success by {x}", x, "success, %", bands, (-3, 103))
    kinds = [name for name in ("target_loss", "base_loss") if name in candidates[0]]
    if kinds:
        falls = [[(a, c[name]) for a, c in zip(alphas, candidates, strict=True)] for name in kinds]
        drawn["loss"] = plots.lines("loss", falls, f"Loss on demonstrations by {x}", x, "loss")
    return {name: Markup(svg) for name, svg in drawn.items()}


def varying(alphas: Sequence[Mapping[str, float]]) -> str | None:
    """The group whose coefficient alone varies, "" where it is common to all groups; None if neither."""
    if all(len(set(alpha.values())) == 1 for alpha in alphas):
        return ""
    groups = [group for group in GROUPS if len({alpha[group] for alpha in alphas}) > 1]
    return groups[0] if len(groups) == 1 else None


def _table(found: Mapping[str, Any]) -> Table:
    """The sweep for the console."""
    plan, first = found["plan"], found["candidates"][0]
    what = f"Success in % on {', '.join(plan['tasks'])}, variant {plan['variant']}"
    table = Table("alpha", title=what if plan["episodes"] else "Losses on demonstrations")
    columns = [name for name in ("target", "generalist", "target_loss", "base_loss") if name in first]
    for name in columns:
        table.add_column(name.replace("_", " "))
    table.add_column("")
    for number, candidate in enumerate(found["candidates"]):
        cells = [
            words.estimate(candidate[c], level=True) if isinstance(candidate[c], dict) else f"{candidate[c]:.3f}"
            for c in columns
        ]
        note = "best" if number == found["best"] else "stopped" if candidate["dropped"] else ""
        table.add_row(words.coefficients(candidate["alpha"]), *cells, note)
    return table
