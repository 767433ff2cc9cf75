"""The commands of the command line, each one small dataclass; heavy modules are imported only when a command runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional

from perennial.alpha.options import Alpha
from perennial.conversion import Convert
from perennial.discovery import Kind
from perennial.errors import PerennialError
from perennial.planning.options import Plan

console = Console()


@dataclass(frozen=True)
class Run:
    """Start a run: teach the preset's tasks in a row and measure what was learned and forgotten.

    Any setting that `perennial list presets PRESET` shows can be given too, as in --seed 1 --recipe.grpo.iterations 6.
    """

    preset: Annotated[Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Name of a preset, see `perennial list presets`."""
    run_dir: Path | None = None
    """Folder of the run, by default runs/<preset>-seed<seed>, with -2, -3 and so on where that exists."""
    dry_run: bool = False
    """Check and print the configuration, then stop."""

    def __call__(self, overrides: dict[str, str]) -> None:
        """Resolve the configuration and run it."""
        from perennial import config as configuration
        from perennial import experiment
        from perennial import overrides as dotted

        config = dotted.apply(configuration.preset(self.preset), overrides)
        configuration.validate(config)
        if self.dry_run:
            console.print_json(json.dumps(configuration.to_json(config)))
            _warn_without_simulator(config.suite)
            return
        experiment.start(config, self.preset, self.run_dir)


def _warn_without_simulator(name: str) -> None:
    """Say on standard error that a run would stop; configurations may be checked where the simulator is missing."""
    from perennial import discovery
    from perennial.suites.base import Suite

    try:
        discovery.find("suites", name, Suite)().require_simulator()
    except PerennialError as error:
        told = f"[yellow]A run would stop:[/yellow] {escape(str(error))}"
        Console(stderr=True).print(told, soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run exactly where its last commit left it."""

    run: Positional[Path]
    """Folder of the run."""

    def __call__(self) -> None:
        """Resume."""
        from perennial import experiment

        experiment.resume(self.run)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's adapter, or a bare checkpoint, on tasks of a suite."""

    run: Positional[Path]
    """Folder of a run, or of a base checkpoint."""
    tasks: tuple[str, ...] = ()
    """Task names; by default all tasks of the run."""
    variant: str | None = None
    """Shifted version of the tasks, see `perennial list suites`; by default the first of the run, or of the suite."""
    after: int = -1
    """Evaluate the policy after this many tasks; -1 is the newest, 0 the base checkpoint."""
    episodes: int = 40
    """Episodes for each task."""
    temperature: float | None = None
    """Of action sampling; 0 is greedy. By default that of the run, 1 for a bare checkpoint."""
    suite: str | None = None
    """Suite of the tasks, for a bare checkpoint; by default metaworld."""
    policy: str | None = None
    """Policy class, for a bare checkpoint; by default openvla_oft."""
    device: str | None = None
    """Where the policy acts: cpu, cuda or cuda:<number>; by default as in the run, cpu for a bare checkpoint."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default as in the run, or what the checkpoint asks for."""
    seed: int | None = None
    """Names the random streams of action sampling; by default that of the run, 0 for a bare checkpoint."""
    workers: int = 0
    """Worker processes; 0 takes as many as the run has, for a bare checkpoint one per processor core."""
    json: bool = False
    """Print JSON, rates in percent."""

    def __call__(self) -> None:
        """Evaluate and print one rate per task."""
        from perennial.evaluation import standalone

        standalone.evaluate(self, console)


@dataclass(frozen=True)
class Study:
    """Run a grid of methods, orders and seeds, as many runs at once as there are cores; repeat the command to go on."""

    study: Positional[str]
    """Name of a study, see `perennial list studies`."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the study, by default runs/study-<name>; what has a result there is skipped."""
    methods: tuple[str, ...] = ()
    """Only these methods; by default all of the study."""
    seeds: tuple[int, ...] = ()
    """Only these seeds; by default all of the study."""
    jobs: int = 0
    """Runs at the same time, each on a core of its own, the first that `taskset` leaves; 0 takes all of them."""
    dry_run: bool = False
    """Print the command of every run, then stop."""

    def __call__(self) -> None:
        """Run what is missing, then write the report."""
        from perennial.studies import base

        study = base.find(self.study)
        entries = base.grid(study, self.methods, tuple(dict.fromkeys(self.seeds)))
        if self.dry_run:
            for entry in entries:
                print(entry.command())
            return
        from perennial.reports import study as report
        from perennial.studies import _execution

        folder = (self.out or Path("runs") / f"study-{self.study}").absolute()
        _execution.execute(study, self.study, folder, entries, self.jobs, console)
        report.command(folder, False, console)


@dataclass(frozen=True)
class Report:
    """Write the report page of a run or a study again and print its numbers."""

    run: Positional[Path]
    """Folder of the run or of the study."""
    json: bool = False
    """Print one JSON object and write nothing."""

    def __call__(self) -> None:
        """Write report/index.html and print the summary; with --json only print."""
        if (self.run / "study.json").exists():
            from perennial.reports import study

            study.command(self.run, self.json, console)
            return
        from perennial.reports import page, summary

        if self.json:
            print(json.dumps(summary.report_json(self.run)))
            return
        target = page.write(self.run)
        summary.print_summary(self.run, console)
        console.print(f"Report: {escape(str(target))}", soft_wrap=True)


@dataclass(frozen=True)
class Compare:
    """Put two or more runs side by side."""

    runs: Positional[tuple[Path, ...]]
    """Folders of the runs; the first is the one that others are compared with."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write the page, by default compare.html in the first run's report folder."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __call__(self) -> None:
        """Compare."""
        from perennial.reports import compare

        compare.command(self.runs, self.out, self.json, console)


@dataclass(frozen=True)
class Mechanism:
    """Measure what learning did to a run's weights: size and rank of the update, Fisher energy, KL, and its scale."""

    run: Positional[Path]
    """Folder of a run that has learned at least one task."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write the page, by default mechanism.html in the run's report folder; the JSON goes beside it."""
    tasks: tuple[str, ...] = ()
    """Tasks on which the base's Fisher information is taken; by default the held-out tasks."""
    episodes: int = 20
    """Episodes for each task at each scale."""
    scales: str = "0,0.25,0.5,0.75,1"
    """Shares of the final update to play with, from 0 (the base) to 1 (what the run has learned)."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __call__(self) -> None:
        """Measure."""
        from perennial.mechanism import command

        command.command(self, console)


@dataclass(frozen=True)
class Demos:
    """Record demonstrations with a suite's scripted experts; repeat the command to continue."""

    out: Positional[Path]
    """Folder to record into."""
    tasks: tuple[str, ...] = ()
    """Task names; by default all tasks of the suite."""
    count: int = 50
    """Demonstrations for each task."""
    first: int = 0
    """Number of the first initial state: record beyond another folder's to hold demonstrations out."""
    variant: str = "id"
    """Variant of the tasks."""
    image_size: int = 64
    """Side of the images in pixels: what the policy that will learn asks for, 224 or 256 for published ones."""
    image_every: int = 4
    """Environment steps from one image to the next."""
    suite: str = "metaworld"
    """Suite of the tasks."""
    workers: int = 0
    """Worker processes; 0 takes one per processor core."""

    def __call__(self) -> None:
        """Record."""
        from perennial.demonstrations import command

        command.record(self, console)


@dataclass(frozen=True)
class Pretrain:
    """Behaviour-clone a base policy from demonstrations; after an interruption, repeat the command to go on."""

    demonstrations: Positional[Path]
    """Folder that `perennial demos` wrote."""
    out: Positional[Path]
    """Folder of the new checkpoint."""
    steps: int = 6000
    """Gradient steps."""
    batch_size: int = 64
    """Decisions in a gradient step."""
    learning_rate: float = 1e-3
    """Highest learning rate; it rises over 200 steps and falls to zero along a cosine."""
    tasks: tuple[str, ...] = ()
    """Learn only these tasks; by default all that were recorded."""
    suite: str = "metaworld"
    """Suite of the demonstrations."""
    policy: str = "openvla_oft"
    """Policy class."""
    width: float = 1.0
    """Widths of the network, as a multiple of the small default's; a multiple of 0.5."""
    seed: int = 0
    """Names the random streams of initialisation, order and augmentation."""
    episodes: int = 40
    """Evaluation episodes for each task, measured at the end and written into the manifest; 0 skips them."""

    def __call__(self) -> None:
        """Pretrain."""
        from perennial import pretraining

        pretraining.pretrain(self, console)


@dataclass(frozen=True)
class Merge:
    """Merge fine-tuned checkpoints or adapters into the base they came from, or one adapter into another one."""

    base: Positional[Path]
    """Pretrained checkpoint, from which everything but the weights is copied; or an adapter, to make an adapter."""
    finetuned: Positional[tuple[Path, ...]]
    """Fine-tuned checkpoints, PEFT adapter folders, or tasks/NN-NAME of runs."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the merged checkpoint or adapter; it must not exist."""
    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare"] = "linear"
    """How to merge; linear and slerp take one fine-tuned model, the others several."""
    alpha: float | None = None
    """Weight of what the fine-tuning changed, from 0 (base) to 1 (fine-tuned); by default 0.8 for linear and slerp, 1
    for the others."""
    vision: Annotated[float | None, tyro.conf.arg(name="alpha.vision")] = None
    """Alpha of the vision parameters, where it differs."""
    language: Annotated[float | None, tyro.conf.arg(name="alpha.language")] = None
    """Alpha of the language parameters, where it differs."""
    action: Annotated[float | None, tyro.conf.arg(name="alpha.action")] = None
    """Alpha of the action parameters, where it differs."""
    extrapolate: bool = False
    """Allow an alpha outside 0 to 1."""
    density: float | None = None
    """Share of what was changed that ties keeps; by default 0.2."""
    drop: float | None = None
    """Share of what was changed that dare drops; by default 0.9."""
    seed: int | None = None
    """Names the random streams of what dare drops; by default 0."""
    rank: int = 0
    """Rank of a merged adapter, with an error that is told; 0 keeps all ranks side by side, which is exact."""

    def __call__(self) -> None:
        """Merge."""
        from perennial.merging import command

        command.command(self, console)


@dataclass(frozen=True)
class Doctor:
    """Check this machine: Python, torch, rendering, simulators, memory, disk. Prints the fix for each problem."""

    def __call__(self) -> None:
        """Diagnose; the exit code is 1 if there is a problem."""
        from perennial import doctor

        checks = doctor.diagnose()
        doctor.print_report(checks, console)
        if any(check.status == "problem" for check in checks):
            sys.exit(1)


@dataclass(frozen=True)
class List:
    """List what can be chosen, or what one choice is and can be set to."""

    kind: Positional[Kind]
    """What to list."""
    name: Positional[str] = ""
    """One of them, to be shown in full."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """List."""
        from perennial import choices

        found = choices.about(self.kind, self.name) if self.name else choices.all_of(self.kind)
        print(json.dumps(found)) if self.json else choices.show(found, console)


COMMANDS: dict[str, type] = {
    "run": Run,
    "plan": Plan,
    "resume": Resume,
    "evaluate": Evaluate,
    "study": Study,
    "report": Report,
    "compare": Compare,
    "mechanism": Mechanism,
    "demos": Demos,
    "pretrain": Pretrain,
    "merge": Merge,
    "alpha": Alpha,
    "convert": Convert,
    "doctor": Doctor,
    "list": List,
}
