"""Everything that is alive while a run works, and how it comes back from the last commit."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.markup import escape

from perennial import discovery
from perennial.config import Config
from perennial.display import Display
from perennial.evaluation.evaluate import episode_count
from perennial.interrupt import InterruptedRunError, TwoStageInterrupt
from perennial.learning.base import Objective
from perennial.learning.optimizer import build_optimizer, optimised
from perennial.planning.check import check_buffers, check_memory
from perennial.policies._learned import load_learned, save_learned
from perennial.policies._placement import load_policy, recompute_blocks
from perennial.policies.base import Policy
from perennial.policies.lora import add_adapter
from perennial.rollout.workers import Cast, Workers, start_beside
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.storage.tensors import load_optimizer, load_tensors, save_optimizer, save_tensors
from perennial.strategies.composition import Strategies
from perennial.suites.base import Suite, Task
from perennial.tracking.base import Tracker


@dataclass(frozen=True)
class Cursor:
    """What comes next: iteration `iteration` of stage `stage` of phase `phase`, all counted from 0."""

    phase: int = 0
    stage: int = 0
    iteration: int = 0


@dataclass
class Session:
    """A run at work.

    Attributes:
        trackers: get every iteration's figures.
        optimizer: of the stage under way; None between phases.
        commit_seconds: wall clock of the last commit, for display only.
    """

    config: Config
    folder: RunFolder
    suite: Suite
    policy: Policy
    strategies: Strategies
    workers: Workers
    display: Display
    interrupt: TwoStageInterrupt
    cursor: Cursor
    trackers: tuple[Tracker, ...] = ()
    optimizer: torch.optim.AdamW | None = None
    commit_seconds: float = 0.0

    def tasks(self, names: tuple[str, ...]) -> tuple[Task, ...]:
        """The suite's tasks of these names."""
        return tuple(self.suite.tasks[name] for name in names)

    def write_learned(self, target: Path) -> None:
        """Write what was learned and what the strategies remember into the folder `target`."""
        save_learned(self.policy, target, self.config.policy.checkpoint)
        save_tensors(self.strategies.state_dict(), target / "strategy.safetensors")

    def commit(self, cursor: Cursor) -> None:
        """Make the present state what a resumed run starts from; stop here if that was asked for."""

        def write(target: Path) -> None:
            self.write_learned(target)
            if self.optimizer is not None:
                save_optimizer(self.optimizer, optimised(self.policy), target / "optimizer.safetensors")

        begun = time.monotonic()
        self.folder.commit(write, {"cursor": asdict(cursor)})
        self.commit_seconds = time.monotonic() - begun
        self.cursor = cursor
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End the run cleanly after the first Ctrl-C."""
        if self.interrupt.requested:
            raise InterruptedRunError(
                f"Stopped with everything committed; continue by `perennial resume {self.folder.path}`."
            )

    def stage_optimizer(self, objective: Objective, cursor: Cursor) -> torch.optim.AdamW:
        """The optimiser of a stage: fresh at its first iteration, else as it was committed."""
        self.optimizer = build_optimizer(self.policy, self.strategies, objective.optimizer, objective.value_rate)
        latest = self.folder.latest() if cursor.iteration else None
        if latest is not None:
            load_optimizer(self.optimizer, optimised(self.policy), latest.path / "optimizer.safetensors")
        return self.optimizer


def prepare(config: Config, folder: RunFolder, stack: ExitStack, begun: bool = False) -> Session:
    """Load the base policy and the last commit, and start the workers; `stack` ends what was started.

    Where the run has `begun`, what is wrong is said to someone who cannot change its options.
    """
    suite = discovery.find("suites", config.suite, Suite)()
    checkpoint = checkpoint_folder(config.policy.checkpoint)
    check_memory(config, begun=begun)
    chosen = config.policy
    policy = load_policy(chosen.name, checkpoint, chosen.device, chosen.dtype)
    if chosen.adapter is not None:
        add_adapter(policy, chosen.adapter, config.seed)
    check_buffers(config.strategies, [suite.tasks[name] for name in config.tasks.trained], policy)
    if chosen.checkpointing:
        recompute_blocks(policy)
    if any("value" in stage.requires() for stage in config.recipe):
        policy.add_value_head(config.seed)
    strategies = Strategies(tuple(replace(strategy) for strategy in config.strategies))
    cursor = Cursor()
    latest = folder.latest()
    if latest is not None:
        read_learned(policy, strategies, latest.path)
        cursor = Cursor(**latest.state["cursor"])
    display = stack.enter_context(Display(total_episodes(config), done_episodes(config, folder, cursor)))
    interrupt = stack.enter_context(TwoStageInterrupt())
    cast = Cast(config.suite, chosen.name, checkpoint, config.seed, chosen.device, chosen.dtype)
    workers = start_beside(config.workers, cast, policy)
    stack.callback(workers.close)
    trackers = tuple(discovery.find("tracking", name, Tracker).open(folder.path) for name in config.trackers)
    for tracker in trackers:
        stack.callback(tracker.close)
    if latest is not None and latest.warning:
        display.say(f"[yellow]{escape(latest.warning)}[/yellow]")
    return Session(config, folder, suite, policy, strategies, workers, display, interrupt, cursor, trackers)


def read_learned(policy: Policy, strategies: Strategies, folder: Path) -> None:
    """Read what `Session.write_learned` wrote."""
    load_learned(policy, folder)
    strategies.load_state_dict(load_tensors(folder / "strategy.safetensors"), policy)


def label(names: tuple[str, ...]) -> str:
    """The task's name, or how many tasks are learned together."""
    return names[0] if len(names) == 1 else f"{len(names)} tasks"


def cells(config: Config, row: int) -> list[Cell]:
    """The cells of one row of the success matrix, in the order in which they are played."""
    return [
        Cell(row, decoder, variant, task)
        for decoder in config.evaluation.decoders
        for variant in config.evaluation.variants
        for task in config.tasks_in(variant)
    ]


def all_cells(config: Config) -> list[Cell]:
    """The cells of the whole success matrix."""
    return [cell for row in range(len(config.phases) + 1) for cell in cells(config, row)]


def played_in(config: Config, suite: Suite, cell: Cell) -> int:
    """How many episodes make a cell."""
    chosen = config.evaluation
    return episode_count(suite, cell.task, cell.variant, chosen.episodes, chosen.temperature_of(cell.decoder))


def total_episodes(config: Config) -> int:
    """All episodes of the run, training and evaluation."""
    learning = sum(_stage_episodes(config, stage) * stage.iterations for stage in config.recipe)
    suite = discovery.find("suites", config.suite, Suite)()
    return learning * len(config.tasks.trained) + sum(played_in(config, suite, cell) for cell in all_cells(config))


def done_episodes(config: Config, folder: RunFolder, cursor: Cursor) -> int:
    """Those of them that are committed."""
    suite = discovery.find("suites", config.suite, Suite)()
    evaluated = sum(played_in(config, suite, cell) for cell in all_cells(config) if folder.has_cell(cell))
    per_stage = [_stage_episodes(config, stage) * stage.iterations for stage in config.recipe]
    done = len(config.phases[0]) * (cursor.phase * sum(per_stage) + sum(per_stage[: cursor.stage]))
    if cursor.iteration:
        done += cursor.iteration * _stage_episodes(config, config.recipe[cursor.stage])
    return done + evaluated


def _stage_episodes(config: Config, stage: Objective) -> int:
    suite = discovery.find("suites", config.suite, Suite)()
    return len(stage.episodes((suite.tasks[config.tasks.trained[0]],), ("count", 0)))
