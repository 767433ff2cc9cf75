"""`perennial plan`: reads a configuration and sizes, counts, and prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perennial import config as configuration
from perennial import discovery, machine, overrides
from perennial.config import Config
from perennial.errors import PerennialError
from perennial.planning import estimate
from perennial.planning.estimate import Time, Use, Work
from perennial.planning.gpus import GPU, GPUS, RESERVED
from perennial.planning.reading import option, read_anatomy, use_of
from perennial.planning.work import work_of
from perennial.policies import _anatomy
from perennial.policies._anatomy import Anatomy
from perennial.policies._groups import GROUPS
from perennial.reports.words import count
from perennial.suites.base import Suite

if TYPE_CHECKING:
    from perennial.planning.options import Plan

WORDS = {
    "weights": "base weights",
    "adapter": "adapter",
    "moments": "AdamW",
    "actors": "weights to act with",
    "gradients": "gradients",
    "kept": "activations kept",
    "passing": "backward pass",
    "acting": "acting",
    "broadcast": "hand over weights",
}
LATENCY_ROWS = 1


def command(options: Plan, changes: dict[str, str], console: Console) -> None:
    """Print the plan of a preset with `changes`.

    Raises:
        PerennialError: the configuration makes no sense, or the policy does not describe its network.
    """
    if not 0 < options.share <= 1 or options.steps_per_second < 0:
        raise PerennialError(
            f"--share is {options.share:g} and --steps-per-second {options.steps_per_second:g}; a share is above 0 and "
            "at most 1, a rate is not negative."
        )
    config = overrides.apply(configuration.preset(options.preset), changes)
    # Neither the checkpoint nor the device nor demonstrations need be here.
    stand_in = replace(config.policy, checkpoint="bundled:metaworld-small", device="cpu")
    configuration.validate_settings(replace(config, policy=stand_in))
    folder, anatomy = read_anatomy(config)
    use, work = use_of(config, anatomy), work_of(config, anatomy.steps)
    suite = discovery.find("suites", config.suite, Suite)
    steps = options.steps_per_second or suite.steps_per_second
    plans = {gpu.name: _plan(config, use, work, gpu, options.share, steps) for gpu in GPUS}
    least = use.capped(1, only_open=True)
    if options.json:
        print(json.dumps(_as_json(least, work, plans)))
        return
    console.print(_title(config, folder, use), highlight=False, soft_wrap=True)
    console.print(_memory_table(least))
    table, notes = _gpu_table(plans)
    _add_this_cpu(table, config, anatomy)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(_assumptions(_players(config, use), work, options.share, steps), highlight=False)


@dataclass(frozen=True)
class OnGPU:
    """A run on one type of GPU.

    Attributes:
        switches: to be turned so that it fits, as on the command line.
        rows: of the largest micro-batch; this and the rest with the switches turned.
        decision: seconds of one decision alone.
        time: of the whole run.
    """

    switches: tuple[str, ...]
    rows: int
    decision: float
    time: Time


def _plan(config: Config, use: Use, work: Work, gpu: GPU, share: float, steps: float) -> OnGPU | None:
    """None where no switch makes it fit."""
    found = estimate.settled(use, gpu.room)
    if found is None:
        return None
    chosen, lighter = found
    return OnGPU(
        tuple(option(config, switch) for switch in chosen),
        lighter.rows,
        estimate.decision_seconds(lighter, gpu, LATENCY_ROWS, share),
        estimate.time(lighter, gpu, work, share, steps),
    )


def _as_json(use: Use, work: Work, plans: Mapping[str, OnGPU | None]) -> dict[str, object]:
    """The plan for programs; bytes and seconds."""
    gpus = {
        name: plan
        and {
            "switches": plan.switches,
            "micro_batch": plan.rows,
            "decision_seconds": plan.decision,
            **asdict(plan.time),
            "total": plan.time.total,
        }
        for name, plan in plans.items()
    }
    memory = estimate.memory(use)
    return {
        "workers": use.actors,
        "parameters": _anatomy.parameters(use.anatomy),
        "adapter_parameters": use.adapter,
        "memory": asdict(memory) | {"peak": memory.peak},
        "work": asdict(work),
        "gpus": gpus,
    }


def _title(config: Config, folder: Path | None, use: Use) -> str:
    learns = f"an adapter of {_count(use.adapter)} learns" if use.rank else "all of them learn"
    total = _count(_anatomy.parameters(use.anatomy))
    frozen = [group for group in GROUPS if not any(group in stage.learns for stage in use.stages)]
    learns += f" ({' and '.join(frozen)} frozen)" if frozen else ""
    where = f"of {config.policy.checkpoint}"
    if folder is None:
        where = f"of the published size, as {config.policy.checkpoint!r} is not on this machine"
    return f"[bold]{config.policy.name}[/bold] {escape(where)}: {total} parameters, {learns}.\n"


def _memory_table(use: Use) -> Table:
    rows = f"{use.rows} rows" if not any(stage.open for stage in use.stages) else "as few rows as can be"
    table = Table(title=f"Memory in GB: updates of {rows}, acting on {use.slots} at once")
    table.add_column("")
    variants = [
        replace(use, dtype=dtype, recompute=again) for dtype in ("float32", "bfloat16") for again in (False, True)
    ]
    for one in variants:
        chosen = "\n(chosen)" if (one.dtype, one.recompute) == (use.dtype, use.recompute) else ""
        table.add_column(f"{one.dtype}{', recompute' if one.recompute else ''}{chosen}", justify="right")
    found = [estimate.memory(one) for one in variants]
    for name, words in WORDS.items():
        table.add_row(words, *(_gigabytes(getattr(one, name)) for one in found))
    table.add_section()
    table.add_row("most at one time", *(_gigabytes(one.peak) for one in found))
    return table


def _gpu_table(plans: Mapping[str, OnGPU | None]) -> tuple[Table, list[str]]:
    """The table, and the switches that its numbers stand for."""
    table = Table(title="Where it fits, and how long it takes at most")
    for name in ("", "fits", "rows", "decision", "acting", "simulators", "updates", "all"):
        table.add_column(
            name, justify="left" if name in ("", "fits") else "right", no_wrap=name in ("", "fits", "rows")
        )
    notes: list[str] = []
    for name, plan in plans.items():
        if plan is None:
            table.add_row(name, "no")
            continue
        words = " ".join(plan.switches)
        if words and words not in notes:
            notes.append(words)
        time = plan.time
        parts = (plan.decision, time.acting, time.simulating, time.learning, time.total)
        verdict = f"with ({notes.index(words) + 1})" if words else "yes"
        table.add_row(name, verdict, str(plan.rows), *map(_duration, parts))
    return table, [f"({number}) {words}" for number, words in enumerate(notes, 1)]


def _add_this_cpu(table: Table, config: Config, anatomy: Anatomy) -> None:
    free = machine.free_memory()
    use = estimate.fitted(use_of(config, anatomy, on_cpu=True), free)
    table.add_section()
    if estimate.memory(use).peak <= free:
        table.add_row("this CPU", "yes", str(use.rows))
    else:
        table.add_row("this CPU", f"no, {_gigabytes(free)} GB free")


def _players(config: Config, use: Use) -> str:
    if config.workers.backend != "process":
        return "one process acts"
    here = "" if config.workers.count else ", as this machine would take; set --workers.count"
    return f"{count(use.actors, 'worker')}{here}"


def _assumptions(players: str, work: Work, share: float, steps: float) -> str:
    return (
        f"Assumed: {players}; {share:.0%} of a GPU's matrix rate in acting and learning, its full bandwidth where "
        f"reading weights takes longer; {steps:,.0f} environment steps a second of each worker, pictures not counted; "
        "one phase after another. An upper bound: every episode lasts to its horizon and every decision has a gradient "
        f"({work.decisions:,.0f} decisions to learn from, {work.evaluated:,.0f} of evaluation, {sum(work.rows):,.0f} "
        f"rows of updates). Rows are those of a micro-batch. Of a GPU {_gigabytes(RESERVED)} GB are left to CUDA. What "
        "strategies and a gate add and simulators' memory are not counted."
    )


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number >= 1e8 else f"{number / 1e9:.3f}"


def _duration(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
