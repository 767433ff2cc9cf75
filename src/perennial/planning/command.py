"""`perennial plan`: reads a configuration and sizes, counts, and prints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perennial import config as configuration
from perennial import discovery, overrides
from perennial.config import Config
from perennial.errors import PerennialError
from perennial.planning import estimate
from perennial.planning.estimate import Use, Work
from perennial.planning.gpus import GPUS, RESERVED
from perennial.planning.reading import option, read_anatomy, use_of
from perennial.planning.work import work_of
from perennial.policies import _anatomy
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
    if options.json:
        print(json.dumps(as_json(use, work, options.share, steps)))
        return
    console.print(_title(config, folder, use), highlight=False, soft_wrap=True)
    console.print(_memory_table(use))
    table, notes = _gpu_table(config, use, work, options.share, steps)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(_assumptions(use, work, options.share, steps), highlight=False)


def as_json(use: Use, work: Work, share: float, steps: float) -> dict[str, object]:
    """The plan for programs; bytes and seconds."""
    found = {}
    for gpu in GPUS:
        lighter = estimate.switches(use, gpu.room)
        seconds = estimate.time(use, gpu, work, share, steps)
        found[gpu.name] = {
            "switches": lighter,
            "decision_seconds": estimate.decision_seconds(use, gpu, LATENCY_ROWS, share),
            **asdict(seconds),
        }
    return {
        "parameters": _anatomy.parameters(use.anatomy),
        "adapter_parameters": _anatomy.adapter_parameters(use.anatomy, use.learning),
        "memory": asdict(estimate.memory(use)) | {"peak": estimate.memory(use).peak},
        "work": asdict(work),
        "gpus": found,
    }


def _title(config: Config, folder: Path | None, use: Use) -> str:
    total, adapter = _anatomy.parameters(use.anatomy), _anatomy.adapter_parameters(use.anatomy, use.learning)
    learns = f"an adapter of {_count(adapter)} learns" if use.rank else "all of them learn"
    where = f"of {config.policy.checkpoint}"
    if folder is None:
        where = f"of the published size, as {config.policy.checkpoint!r} is not on this machine"
    return f"[bold]{config.policy.name}[/bold] {escape(where)}: {_count(total)} parameters, {learns}.\n"


def _memory_table(use: Use) -> Table:
    table = Table(title=f"Memory in GB: updates of {use.micro_batch} rows, acting on {use.slots} at once")
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


def _gpu_table(config: Config, use: Use, work: Work, share: float, steps: float) -> tuple[Table, list[str]]:
    """The table, and the switches that its numbers stand for."""
    table = Table(title="Where it fits, and how long it takes at most")
    for name in ("", "fits", "decision", "acting", "simulators", "updates", "all"):
        table.add_column(name, justify="left" if name in ("", "fits") else "right", no_wrap=not name)
    notes: list[str] = []
    for gpu in GPUS:
        found = estimate.switches(use, gpu.room)
        if found is None:
            table.add_row(gpu.name, "no")
            continue
        words = " ".join(option(config, switch) for switch in found)
        if words and words not in notes:
            notes.append(words)
        lighter = estimate.apply(use, found)
        seconds = estimate.time(lighter, gpu, work, share, steps)
        parts = (seconds.acting, seconds.simulating, seconds.learning, seconds.total)
        latency = estimate.decision_seconds(lighter, gpu, LATENCY_ROWS, share)
        verdict = f"with ({notes.index(words) + 1})" if words else "yes"
        table.add_row(gpu.name, verdict, *map(_duration, (latency, *parts)))
    here = estimate.memory(use_of(config, use.anatomy, on_cpu=True)).peak
    free = psutil.virtual_memory().available
    table.add_section()
    table.add_row("this CPU", "yes" if here <= free else f"no, {_gigabytes(free)} GB free")
    return table, [f"({number}) {words}" for number, words in enumerate(notes, 1)]


def _assumptions(use: Use, work: Work, share: float, steps: float) -> str:
    return (
        f"Assumed: {share:.0%} of a GPU's matrix rate in acting and learning, its full bandwidth where reading weights "
        f"takes longer; {steps:,.0f} environment steps a second of each worker, pictures not counted; one "
        "phase after another. An upper bound: every episode lasts to its horizon and every decision has a gradient "
        f"({work.decisions:,.0f} decisions to learn from, {work.evaluated:,.0f} of evaluation, {work.rows:,.0f} rows "
        f"of updates). Of a GPU {_gigabytes(RESERVED)} GB are left to CUDA. What strategies and a gate "
        "add and simulators' memory are not counted."
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
