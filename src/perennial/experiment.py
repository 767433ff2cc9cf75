"""The main job: for each task the policy goes through the stages of the recipe, then every task is evaluated.

Read this first. State lives in commits of the run folder; a `Cursor` says what comes next, so the same code starts a
run and resumes one: what is done is skipped, what was under way is done again from the last commit with the same
random streams, and the result is the same bit for bit.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.markup import escape

from perennial import config as configuration
from perennial import discovery, faults, gating, machine, overrides
from perennial.config import Config
from perennial.doctor import describe_machine
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.evaluation.standalone import of_run
from perennial.learning.stage import Iteration, learn
from perennial.planning.check import fit_micro_batches
from perennial.policies.lora import set_trainable
from perennial.reports import page, video
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.rollout.workers import sized
from perennial.session import Cursor, Session, all_cells, cells, label, prepare
from perennial.storage.run_folder import RunFolder
from perennial.suites.base import Suite, Task


def start(config: Config, preset: str, path: Path | None) -> Path:
    """Start a run in a new folder and see it through; returns the folder.

    What depends on this machine or place is written down as it is now: the numbers of workers and threads, the paths of
    the checkpoint and of demonstrations, micro-batches that fit into the memory.
    """
    discovery.find("suites", config.suite, Suite)().require_simulator()
    config = fit_micro_batches(configuration.settled(_counted(config)))
    path = path or RunFolder.free_path(f"{preset}-seed{config.seed}")
    described = configuration.to_json(config), describe_machine()
    with RunFolder.create(path, preset, *described) as folder, ExitStack() as stack:
        try:
            session = prepare(config, folder, stack)
        except PerennialError:
            folder.withdraw()  # it has not begun, and with other settings it may
            raise
        _run(session)
    return path


def resume(path: Path) -> None:
    """Continue the run in `path`; a finished run only gets its report written again, which needs nothing else."""
    with RunFolder.open_locked(path) as folder, ExitStack() as stack:
        config = _counted(overrides.from_json(Config, folder.header["config"]))
        if _is_finished(config, folder):
            print(f"Report: {page.write(path)}")
            return
        _run(prepare(configuration.validate(config), folder, stack, begun=True))


def _is_finished(config: Config, folder: RunFolder) -> bool:
    """Whether nothing is left to evaluate, to film or to learn."""
    last = len(config.phases)
    if not all(map(folder.has_cell, all_cells(config))) or not all(f.exists() for f in _films(config, folder, last)):
        return False
    latest = folder.latest()  # an older one where the newest is damaged
    return latest is not None and Cursor(**latest.state["cursor"]) == Cursor(last)


def _counted(config: Config) -> Config:
    """`config` with the numbers of workers and threads decided where they are open, as rounding depends on them."""
    return replace(config, workers=sized(config.workers), threads=config.threads or machine.cores())


def _run(session: Session) -> None:
    """The task loop: row 0 of the success matrix, then for each phase learn it and add a row."""
    session.display.say(f"Run: {escape(str(session.folder.path))}")
    _evaluate_lost(session)
    if session.cursor == Cursor(session.cursor.phase):  # later, the policy is no longer the one of this row
        _evaluate_row(session, session.cursor.phase)
    for phase in range(session.cursor.phase, len(session.config.phases)):
        _learn_phase(session, phase)
        _evaluate_row(session, phase + 1)
    session.display.say(f"Report: {escape(str(page.write(session.folder.path)))}")


def _learn_phase(session: Session, phase: int) -> None:
    """Take the policy through the recipe's stages on the tasks of one phase."""
    config, names = session.config, session.config.phases[phase]
    tasks = session.tasks(names)
    if session.cursor == Cursor():
        gating.keep_base(session)
    if session.cursor == Cursor(phase):
        with _cost(session, phase, "before_task"):
            for task in tasks:
                session.strategies.before_task(task, session.policy)
    for number in range(session.cursor.stage, len(config.recipe)):
        # Joint learning gets the budget of all its tasks.
        objective = replace(config.recipe[number], iterations=config.recipe[number].iterations * len(tasks))
        cursor = session.cursor if session.cursor.stage == number else Cursor(phase, number)
        set_trainable(session.policy, objective.learns)
        session.display.begin(f"learning {label(names)}")
        learn(
            objective,
            tasks,
            session.policy,
            session.strategies,
            session.workers,
            session.stage_optimizer(objective, cursor),
            key=("train", phase, number),
            seed=config.seed,
            threads=config.threads,
            start=cursor.iteration,
            on_episode=session.display.episode,
            on_iteration=functools.partial(_finish_iteration, session, phase, number, objective.iterations),
        )
    session.optimizer = None
    set_trainable(session.policy)
    torch.set_num_threads(config.threads)  # also where no iteration was left to learn
    with _cost(session, phase, "after_task") as cost:
        for task in tasks:
            session.strategies.after_task(task, session.policy, functools.partial(_collect, session, phase, cost, task))
            for strategy, account in session.strategies.accounts().items():
                place = {"task": task.name, "task_index": phase + 1, "strategy": strategy}
                session.folder.log("metrics", {"event": "strategy", **place, **account})
    gating.pass_gate(session, phase)
    torch.set_num_threads(config.threads)  # the gate plays with one
    with _cost(session, phase, "remember") as cost:
        for task in tasks:
            session.strategies.remember(task, session.policy, functools.partial(_collect, session, phase, cost, task))
    session.folder.save_task(phase + 1, label(names), session.write_learned)
    session.commit(Cursor(phase + 1))


def _finish_iteration(session: Session, phase: int, stage: int, total: int, done: Iteration) -> None:
    """Show, log and commit an iteration."""
    name = label(session.config.phases[phase])
    place = {"task_index": phase + 1, "stage": stage, "iteration": done.number}
    played = {"success": done.success, "episodes": done.episodes, "env_steps": done.env_steps}
    seconds = {"rollout_seconds": done.rollout_seconds, "update_seconds": done.update_seconds}
    seconds["commit_seconds"] = session.commit_seconds  # of the commit before, as this one is still to come
    objective = session.config.recipe[stage].name
    session.display.iteration(name, done, total)
    if done.metrics["kept"] == 0:
        effect = "only the strategies acted" if done.metrics.get("grad_norm") else "nothing was learned"
        session.display.say(
            f"[yellow]No learning signal: the {done.episodes} episodes of {name} ended alike in every group, so "
            f"{effect}. Check what the base checkpoint can do with `perennial evaluate`.[/yellow]"
        )
    row = {"event": "iteration", "task": name, **place, "objective": objective, **played, **done.metrics}
    session.folder.log("metrics", row)
    session.folder.log("timings", {"event": "iteration", **place, **seconds})
    iterations = [s.iterations for s in session.config.recipe]
    step = phase * sum(iterations) + len(session.config.phases[phase]) * sum(iterations[:stage]) + done.number
    for tracker in session.trackers:
        tracker.log(step, {**done.metrics, **({} if done.success is None else {"success": done.success})})
    session.commit(Cursor(phase, stage, done.number + 1))


@contextmanager
def _cost(session: Session, phase: int, hook: str) -> Iterator[Counter[str]]:
    """Log the time that strategies take in a hook, and what is counted meanwhile of the episodes that they play."""
    begun, played = time.monotonic(), Counter(episodes=0, env_steps=0)
    yield played
    place = {"hook": hook, "task_index": phase + 1}
    session.folder.log("timings", {"event": "strategy", **place, "seconds": time.monotonic() - begun, **played})


def _collect(
    session: Session,
    phase: int,
    cost: Counter[str],
    learned: Task,
    count: int,
    task: str | None = None,
    variant: str = "id",
    first: int = 0,
) -> list[Trajectory]:
    """Play sampled training episodes after phase `phase` for a strategy, counted; see `strategies.base.Collect`."""
    session.workers.follow(session.policy)
    played = learned if task is None else session.suite.tasks[task]
    temperature, place = session.config.evaluation.temperature, () if variant == "id" else (variant,)
    episodes = [
        Episode(
            task=played.name,
            variant=variant,
            split="training",
            initial_state=i,
            instruction=played.instructions[i % len(played.instructions)],
            temperature=temperature,
            key=("after", phase, played.name, *place, i),
            group=i,
        )
        for i in range(first, first + count)
    ]
    trajectories = session.workers.collect(episodes)
    cost.update(episodes=count, env_steps=int(sum(t.steps.sum() for t in trajectories)))
    return trajectories


def _evaluate_lost(session: Session) -> None:
    """Play what is missing of the rows that are behind, by the weights kept after those tasks."""
    begun = session.cursor != Cursor(session.cursor.phase)
    for row in range(session.cursor.phase + begun):
        if all(session.folder.has_cell(cell) for cell in cells(session.config, row)):
            continue
        try:
            actor = of_run(session.folder, row, session.config.seed)
        except PerennialError as error:
            session.display.say(
                f"[yellow]Row {row} of the success matrix stays incomplete: {escape(str(error))}[/yellow]"
            )
            continue
        _evaluate_row(replace(session, policy=actor.policy, strategies=actor.strategies), row)


def _evaluate_row(session: Session, row: int) -> None:
    """Fill the cells of one row that are still missing; film the first and the last row."""
    config = session.config.evaluation
    torch.set_num_threads(1)
    for cell in cells(session.config, row):
        if session.folder.has_cell(cell):
            continue
        begun = time.monotonic()
        session.display.begin(f"evaluating {cell.task} ({cell.decoder})")
        task = session.suite.tasks[cell.task]
        _cast(session, task)
        temperature = config.temperature_of(cell.decoder)
        episodes = evaluation_episodes(session.suite, cell.task, cell.variant, config.episodes, temperature)
        played = session.workers.collect(episodes, session.display.episode)
        faults.point("evaluate")
        steps = [int(t.steps.sum()) for t in played]
        states = session.suite.states(cell.task, "evaluation", cell.variant)
        figures = {"episodes": len(played), "env_steps": sum(steps), "seconds": time.monotonic() - begun}
        # Before the cell, as it is never played again; without the cell, a resumed run forgets the line.
        session.folder.log("timings", {"event": "evaluation", **asdict(cell), **figures})
        session.folder.write_cell(cell, [t.success for t in played], steps, states)
        session.stop_if_asked()
    for target in _films(session.config, session.folder, row):
        _film(session, session.suite.tasks[target.stem], target)
    _say_row(session, row)
    page.write(session.folder.path)


def _cast(session: Session, task: Task) -> None:
    """Have the workers act in `task` as was learned, or with the weights that a strategy chose for it."""
    if session.strategies.chooser is None:
        session.workers.follow(session.policy)
    else:
        session.workers.broadcast(session.strategies.policy_for(task, session.policy))


def _say_row(session: Session, row: int) -> None:
    """One line with the row's success rates by the headline decoder."""
    rates = []
    for cell in cells(session.config, row)[: len(session.config.tasks.trained) + len(session.config.tasks.held_out)]:
        outcome = session.folder.cell(cell)
        assert outcome is not None
        rates.append(f"{cell.task} {sum(outcome.successes) / len(outcome.successes):.0%}")
    title = "base checkpoint" if row == 0 else f"after {row} of {len(session.config.phases)}"
    session.display.say(f"[bold]{title}[/bold]  {'  '.join(rates)}")


def _films(config: Config, folder: RunFolder, row: int) -> list[Path]:
    """Where the films of one row belong, one of each task, if it is the first or the last row."""
    names = (*config.tasks.trained, *config.tasks.held_out)
    filmed = config.evaluation.film and row in (0, len(config.phases))
    return [folder.path / "videos" / f"{row:02d}" / f"{name}.mp4" for name in names] if filmed else []


def _film(session: Session, task: Task, target: Path) -> None:
    """Record the greedy policy on the first evaluation state."""
    if not target.exists():
        session.display.begin(f"filming {task.name}")
        _cast(session, task)
        (episode,) = evaluation_episodes(session.suite, task.name, "id", 1, 0.0)
        played = session.workers.collect([replace(episode, film=session.config.evaluation.film)])[0]
        video.encode(played.frames, target, fps=20)
