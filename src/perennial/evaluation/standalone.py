"""Evaluates a finished or unfinished run, or a bare checkpoint, on any tasks: `perennial evaluate`."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from perennial import discovery, overrides
from perennial.config import Config, PolicyChoice
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.evaluation.statistics import wilson
from perennial.policies._placement import DType, check_placement, load_policy
from perennial.policies.base import Policy
from perennial.policies.lora import add_adapter
from perennial.reports.summary import percent
from perennial.rollout.workers import Cast, WorkerConfig, start_workers
from perennial.session import label, read_learned
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.storage.run_folder import RunFolder
from perennial.strategies.composition import Strategies
from perennial.suites.base import Suite, require_known

if TYPE_CHECKING:
    from perennial.commands import Evaluate


def evaluate(options: Evaluate, console: Console) -> None:
    """Play `options.episodes` evaluation episodes of each task and print success rates with 95 % intervals.

    Raises:
        PerennialError: the folder is neither a run nor a checkpoint, a task or variant does not exist, or a number is
            out of range.
    """
    if options.episodes < 1:
        raise PerennialError(f"--episodes is {options.episodes}, but it must be above 0.")
    for name in ("temperature", "workers"):
        if (getattr(options, name) or 0) < 0:
            raise PerennialError(f"--{name} is {getattr(options, name)}, but it must be 0 or more.")
    actor = _actor(options)
    cast = actor.cast
    suite = discovery.find("suites", cast.suite, Suite)()
    variant = options.variant or actor.variant
    temperature = actor.temperature if options.temperature is None else options.temperature
    require_known(suite, cast.suite, options.tasks, [variant])
    rows: list[dict[str, Any]] = []
    sized = replace(actor.workers, count=options.workers or actor.workers.count)
    with closing(start_workers(sized, cast, actor.policy.acting_weights())) as workers:
        for name in track(options.tasks or actor.tasks, "evaluating", console=console, disable=options.json):
            workers.broadcast(actor.strategies.policy_for(suite.tasks[name], actor.policy))
            episodes = evaluation_episodes(suite, name, variant, options.episodes, temperature)
            successes = [t.success for t in workers.collect(episodes)]
            states = suite.states(name, "evaluation", variant)
            rate = percent(wilson(sum(successes), len(successes), states))
            assert rate is not None
            rows.append({"task": name, **rate})
    if options.json:
        print(json.dumps({"variant": variant, "temperature": temperature, "seed": cast.seed, "tasks": rows}))
    else:
        console.print(_table(rows, variant, temperature))


def _actor(options: Evaluate) -> Actor:
    """Who is meant; options that would have no effect are not taken."""
    if options.device is not None:
        check_placement(options.device, options.dtype, "--")
    if not (options.run / "run.json").is_file():
        return _from_checkpoint(options)
    if options.suite or options.policy:
        raise PerennialError(
            f"{options.run} is a run, which has a suite and a policy of its own; leave out --suite and --policy."
        )
    return of_run(RunFolder.open(options.run), options.after, options.seed, options.device, options.dtype)


@dataclass(frozen=True)
class Actor:
    """Who is evaluated by which workers; on which tasks, in which variant and at which temperature by default."""

    policy: Policy
    strategies: Strategies
    cast: Cast
    workers: WorkerConfig
    tasks: tuple[str, ...]
    variant: str
    temperature: float


def of_run(
    folder: RunFolder, after: int, seed: int | None = None, device: str | None = None, dtype: DType | None = None
) -> Actor:
    """The policy of a run after `after` tasks, -1 for the newest.

    `seed` names the streams of action sampling; where it, `device` or `dtype` is None, it is that of the run.

    Raises:
        PerennialError: the run has not come that far, or its files are damaged.
    """
    config: Config = overrides.from_json(Config, folder.header["config"])
    if not -1 <= after <= len(config.phases):
        raise PerennialError(f"--after is {after}; it must be -1 (the newest) to {len(config.phases)}.")
    checkpoint = checkpoint_folder(config.policy.checkpoint)
    name, device, dtype = config.policy.name, device or config.policy.device, dtype or config.policy.dtype
    policy = load_policy(name, checkpoint, device, dtype)
    strategies = Strategies()
    learned = _learned_folder(folder, config, after)
    if learned is not None:
        strategies = Strategies(config.strategies)
        if config.policy.adapter is not None:
            add_adapter(policy, config.policy.adapter, config.seed)
        read_learned(policy, strategies, learned)
    cast = Cast(config.suite, name, checkpoint, config.seed if seed is None else seed, device, dtype)
    tasks, measured = (*config.tasks.trained, *config.tasks.held_out), config.evaluation
    return Actor(policy, strategies, cast, config.workers, tasks, measured.variants[0], measured.temperature)


def _learned_folder(folder: RunFolder, config: Config, after: int) -> Path | None:
    """Where the weights after `after` tasks lie, checked for damage; None for the base checkpoint."""
    if after == 0:
        return None
    if after < 0:
        latest = folder.latest()
        return latest.path if latest else None
    name = label(config.phases[after - 1])
    if not folder.has_task(after, name):
        raise PerennialError(
            f"{folder.path} has no weights of {name!r}; continue it with `perennial resume {folder.path}` if it has "
            "not learned that yet, else restore the folder in tasks from a copy."
        )
    return folder.task(after, name)


def _from_checkpoint(options: Evaluate) -> Actor:
    """A bare base checkpoint."""
    checkpoint = checkpoint_folder(str(options.run))
    if options.after > 0:
        raise PerennialError(
            f"{options.run} is no run, so it has not learned {options.after} tasks; leave out --after."
        )
    name, suite_name = options.policy or PolicyChoice.name, options.suite or Config.suite
    suite = discovery.find("suites", suite_name, Suite)()
    cast = Cast(suite_name, name, checkpoint, options.seed or 0, options.device or "cpu", options.dtype)
    policy = load_policy(name, checkpoint, cast.device, cast.dtype)
    return Actor(policy, Strategies(), cast, WorkerConfig(), tuple(suite.tasks), suite.variants[0], 1.0)


def _table(rows: list[dict[str, Any]], variant: str, temperature: float) -> Table:
    decoder = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    table = Table(title=f"Success, {max(row['n'] for row in rows)} episodes a task, {decoder}, variant {variant}")
    for column in ("task", "success", "95 % interval"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["task"], f"{row['value']:.0f}%", f"{row['low']:.0f}% to {row['high']:.0f}%")
    return table
