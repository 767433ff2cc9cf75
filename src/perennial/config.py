"""What a run is: a value made of frozen dataclasses, with dotted overrides and a check before anything starts.

`overrides.apply(preset("demo"), {"seed": "1", "recipe.grpo.groups": "8", "strategies": "ewc"})` is how the command
line makes one. Pieces that come in kinds are chosen by name (`--policy.name`, `--recipe grpo`, `--strategies
ewc,replay`) and their own settings are reached through that name (`--strategies.ewc.coefficient 10`). A number in place
of the name, counted from 1, means one of several stages of a kind (`--recipe grpo,grpo --recipe.2.iterations 4`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from perennial import discovery
from perennial.errors import PerennialError, unknown
from perennial.evaluation.evaluate import includes_held_out
from perennial.evaluation.gate import Gate
from perennial.learning.base import Objective
from perennial.learning.grpo import GRPO
from perennial.policies._groups import GROUPS
from perennial.policies._placement import DType, check_placement
from perennial.policies.base import Policy
from perennial.policies.lora import LoRA
from perennial.rollout.workers import WorkerConfig
from perennial.storage.base_checkpoint import absolute, checkpoint_folder
from perennial.strategies.base import Strategy
from perennial.strategies.composition import Strategies
from perennial.suites.base import Suite, require_known


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, in the order in which they are taught; held-out tasks are only evaluated."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    def check(self) -> None:
        """At least one task to train, and none twice."""
        names = (*self.trained, *self.held_out)
        if not self.trained:
            raise PerennialError("There is no task to train; set --tasks.trained to one or more task names.")
        for name in names:
            if names.count(name) > 1:
                raise PerennialError(
                    f"The task {name!r} is listed twice among trained and held-out tasks; keep it once."
                )


@dataclass(frozen=True)
class PolicyChoice:
    """Which policy starts, from which checkpoint, and what of it learns.

    Attributes:
        name: of the policy class.
        checkpoint: a folder, `bundled:<name>` for one that comes with Perennial, or `hub:<owner>/<name>`, in short
            `<owner>/<name>`, for one that `hf download` has put on this disk.
        adapter: the LoRA that learns; None trains every parameter.
        device: where the policy learns and acts: cpu, cuda or cuda:<number>.
        dtype: of the base weights, "float32" or "bfloat16"; None takes what the checkpoint asks for. An adapter is
            always float32.
        checkpointing: the update keeps less and computes more, see `perennial.policies._placement`.
    """

    name: str = "openvla_oft"
    checkpoint: str = "bundled:metaworld-small"
    adapter: LoRA | None = field(default_factory=LoRA)
    device: str = "cpu"
    dtype: DType | None = None
    checkpointing: bool = False

    def find(self) -> type[Policy]:
        """The policy's class, after a look at what is asked of it and at its checkpoint."""
        policy = discovery.find("policies", self.name, Policy)
        check_placement(self.device, self.dtype)
        if self.checkpointing and not policy.can("blocks"):
            raise PerennialError(
                f"The policy {self.name!r} cannot recompute activations; set --policy.checkpointing false."
            )
        checkpoint_folder(self.checkpoint)
        return policy


@dataclass(frozen=True)
class Evaluation:
    """How every task is evaluated before the first task and after each.

    Attributes:
        episodes: per task, decoder and variant; evaluation initial states 0 .. episodes - 1.
        temperature: of the sampled decoder.
        decoders: "sampled", "greedy"; the first one is the headline.
        variants: of the suite; the first one is the headline.
        held_out: the variants among them in which held-out tasks are evaluated: "all", or only the "first".
        film: side of the before and after videos in pixels; 0 records none.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"film"})
    episodes: int = 40
    temperature: float = 1.0
    decoders: tuple[Literal["sampled", "greedy"], ...] = ("sampled", "greedy")
    variants: tuple[str, ...] = ("id",)
    held_out: Literal["all", "first"] = "all"
    film: int = 240

    def check(self) -> None:
        """At least one decoder and one variant, and none twice."""
        _check_names("evaluation.decoders", self.decoders)
        _check_names("evaluation.variants", self.variants)

    def temperature_of(self, decoder: str) -> float:
        """Of action sampling; 0 is greedy."""
        return self.temperature if decoder == "sampled" else 0.0


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        seed: names every random stream of the run.
        suite: where the tasks live.
        schedule: "sequential" teaches one task after another; "joint" teaches all at once with the same total budget,
            the multitask oracle.
        recipe: the stages that the policy goes through for each task.
        strategies: what guards old skills; none is sequential fine-tuning.
        gate: how much may be forgotten with every task; by default whatever is forgotten is carried on.
        threads: with which the learner computes while the workers wait; 0 takes one per processor core.
        trackers: loggers beside the JSON lines that are always written.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"seed", "threads"})
    tasks: Tasks
    seed: int = 0
    suite: str = "metaworld"
    schedule: Literal["sequential", "joint"] = "sequential"
    policy: PolicyChoice = field(default_factory=PolicyChoice)
    recipe: tuple[Objective, ...] = (GRPO(),)
    strategies: tuple[Strategy, ...] = ()
    gate: Gate = field(default_factory=Gate)
    evaluation: Evaluation = field(default_factory=Evaluation)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    threads: int = 0
    trackers: tuple[str, ...] = ()

    def tasks_in(self, variant: str) -> tuple[str, ...]:
        """The tasks that are evaluated in this variant."""
        included = includes_held_out(variant, self.evaluation.variants, self.evaluation.held_out)
        return self.tasks.trained + (self.tasks.held_out if included else ())

    @property
    def phases(self) -> tuple[tuple[str, ...], ...]:
        """The tasks learned together, phase by phase; a row of the success matrix follows each phase."""
        return (self.tasks.trained,) if self.schedule == "joint" else tuple((task,) for task in self.tasks.trained)

    def guarded(self, phase: int) -> tuple[str, ...]:
        """The tasks that phase `phase` must not harm: those taught before, and the first held-out ones."""
        taught = [task for names in self.phases[:phase] for task in names]
        return (*taught, *self.tasks.held_out[: self.gate.held_out])


def settled(config: Config) -> Config:
    """The same run, with paths that do not depend on the present folder."""
    return replace(
        config,
        policy=replace(config.policy, checkpoint=absolute(config.policy.checkpoint)),
        recipe=tuple(stage.settled() for stage in config.recipe),
        strategies=tuple(strategy.settled() for strategy in config.strategies),
    )


def validate(config: Config) -> Config:
    """Check everything that can be known before a simulator, a download or a GPU is touched.

    Raises:
        PerennialError: a sentence about the first thing that cannot work.
    """
    validate_settings(config)
    suite = discovery.find("suites", config.suite, Suite)()
    played = {"id": config.tasks.trained}
    played |= {variant: config.tasks.trained for strategy in config.strategies for variant in strategy.variants()}
    played |= {variant: config.tasks_in(variant) for variant in config.evaluation.variants}
    for variant, tasks in played.items():
        for task in tasks:
            suite.check(task, variant)
    for stage in config.recipe:
        stage.check(config.tasks.trained)
    for strategy in config.strategies:
        strategy.check(config.tasks.trained)
    _check_lengths(config, suite)
    return config


def validate_settings(config: Config) -> Config:
    """Check what does not depend on demonstrations, which need not be recorded to plan a run.

    Raises:
        PerennialError: a sentence about the first thing that cannot work.
    """
    suite = discovery.find("suites", config.suite, Suite)()
    played = [variant for strategy in config.strategies for variant in sorted(strategy.variants())]
    _check_tasks(config, suite)
    require_known(suite, config.suite, variants=(*config.evaluation.variants, *played))
    config.tasks.check()
    config.evaluation.check()
    _check_adapter(config.policy.adapter)
    policy = config.policy.find()
    _check_recipe(config, policy)
    _check_strategies(config, policy)
    for tracker in config.trackers:
        discovery.load("tracking", tracker)
    _check_gate(config, suite)
    _check_ranges(config)
    for stage in config.recipe:
        stage.optimizer.check()
    return config


def _check_tasks(config: Config, suite: Suite) -> None:
    """Every task is one of the suite's; who changes only the suite of a preset still has the tasks of another."""
    names = (*config.tasks.trained, *config.tasks.held_out)
    for name in names:
        if name not in suite.tasks and (owner := _owner(name)) is not None:
            raise PerennialError(
                f"The task {name!r} belongs to the suite {owner!r}, not to {config.suite!r}; beside --suite, give "
                f"--tasks.trained and --tasks.held_out with tasks that `perennial list suites {config.suite}` names."
            )
    require_known(suite, config.suite, names)


def _owner(task: str) -> str | None:
    """The first suite that has a task of this name."""
    for name in discovery.names("suites"):
        with suppress(Exception):  # a suite that has no tasks without an argument, or of a broken package
            if task in discovery.find("suites", name, Suite)().tasks:
                return name
    return None


def _check_lengths(config: Config, suite: Suite) -> None:
    """The checkpoint reads and gives as many numbers as the suite has, as far as its config tells."""
    policy, checkpoint = config.policy.find(), config.policy.checkpoint
    sentence = suite.tasks[config.tasks.trained[0]].evaluation_instruction
    try:
        anatomy = policy.anatomy(checkpoint_folder(checkpoint), sentence)
    except (NotImplementedError, PerennialError, OSError, LookupError, TypeError, ValueError):
        return  # loading says better what is wrong
    lengths = {"state": (anatomy.state_dim, suite.state_dim), "action": (anatomy.action_dim, suite.action_dim)}
    for what, (found, wanted) in lengths.items():
        if found not in (None, wanted):
            raise PerennialError(
                f"The checkpoint {checkpoint!r} works with {found} {what} numbers, but the suite {config.suite!r} has "
                f"{wanted}; choose one that was trained on this suite by --policy.checkpoint."
            )


def _check_names(option: str, chosen: tuple[str, ...]) -> None:
    """At least one name, and none twice."""
    if not chosen or len(set(chosen)) < len(chosen):
        raise PerennialError(f"--{option} is {','.join(chosen)!r}, but it needs names, each of them once.")


def _check_adapter(adapter: LoRA | None) -> None:
    """Ranks are of groups that there are."""
    for group in adapter.rank_by_group if adapter else ():
        if group not in GROUPS:
            raise unknown("parameter group in --policy.adapter.rank-by-group", group, GROUPS)


def _check_recipe(config: Config, policy: type[Policy]) -> None:
    """There is a stage, and the policy can do what each of them asks for."""
    if not config.recipe:
        raise PerennialError("The recipe has no stage; choose at least one, for example --recipe grpo.")
    for stage in config.recipe:
        _check_names(f"recipe.{stage.name}.learns", stage.learns)
        _check_methods(stage, config.policy.name, policy)


def _check_strategies(config: Config, policy: type[Policy]) -> None:
    """The policy can do what each of them asks for, what has one owner has no more, and none is there twice."""
    for strategy in config.strategies:
        _check_methods(strategy, config.policy.name, policy)
        if config.schedule == "joint" and (why := strategy.unjoined()) is not None:
            raise PerennialError(
                f"{strategy.name!r} cannot guard tasks that are learned all at once, as {why}; leave it out, or set "
                "--schedule sequential."
            )
    for number, strategy in enumerate(config.strategies):
        if (why := strategy.unfit(config.strategies[:number], config.strategies[number + 1 :])) is not None:
            raise PerennialError(f"{strategy.name!r} cannot guard tasks beside the other strategies, as {why}.")
    for hook, what in (("parameter_groups", "set learning rates"), ("policy_for", "choose the weights that act")):
        owners = [part.name for part in config.strategies if getattr(type(part), hook) is not getattr(Strategy, hook)]
        if len(owners) > 1:
            raise PerennialError(f"The strategies {' and '.join(owners)} all {what}; keep one of them.")
    if config.workers.backend == "shared" and (chooser := Strategies(config.strategies).chooser) is not None:
        raise PerennialError(
            f"{chooser.name!r} chooses the weights that act, but --workers.backend shared acts with those that learn; "
            "set --workers.backend inline."
        )
    if len(set(map(type, config.strategies))) < len(config.strategies):
        names = ",".join(strategy.name for strategy in config.strategies)
        raise PerennialError(f"--strategies is {names!r}, but each of them may be chosen once.")


def _check_methods(part: Objective | Strategy, name: str, policy: type[Policy]) -> None:
    """The policy chosen by `name` has every optional method that `part` calls."""
    for method in sorted(part.requires()):
        if not policy.can(method):
            kind = "recipe" if isinstance(part, Objective) else "strategy"
            why = f", as {policy.missing[method]}" if method in policy.missing else ""
            raise PerennialError(
                f"{part.name!r} needs `{method}`, which the policy {name!r} does not have{why}; "
                f"choose another {kind} or policy."
            )


def _check_gate(config: Config, suite: Suite) -> None:
    """There is something to guard, one policy to judge, and enough initial states to judge it."""
    config.gate.check()
    if config.gate.max_forgetting is None:
        return
    for strategy in config.strategies:
        if (why := strategy.ungated()) is not None:
            raise PerennialError(
                f"A gate cannot guard what {strategy.name!r} makes, as {why}; leave out --gate.max_forgetting or "
                f"{strategy.name!r}."
            )
    guarded = config.guarded(len(config.phases) - 1)
    if not guarded:
        raise PerennialError(
            "The gate has nothing to guard, as no task is taught before another; guard held-out tasks by "
            "--tasks.held_out and --gate.held_out."
        )
    gate = config.gate.limited(suite, guarded)
    if gate != config.gate and not gate.can_show():
        raise PerennialError(
            f"The gate can never show that success falls by less than {gate.max_forgetting:g} points, as "
            f"{len(guarded)} guarded tasks with their few initial states give {gate.pairs} pairs of episodes; raise "
            "--gate.max_forgetting or --gate.held_out."
        )


def _check_ranges(value: Any, path: str = "") -> None:
    """Every number is above 0, or 0 where its class says `may_be_zero`; strategies check their own coefficients."""
    zero: frozenset[str] = getattr(value, "may_be_zero", frozenset())
    for f in fields(value):
        child, name = getattr(value, f.name), f"{path}{f.name}"
        if f.name == "strategies":
            continue
        if isinstance(child, tuple) and child and is_dataclass(child[0]):
            for part in child:
                _check_ranges(part, f"{name}.{getattr(part, 'name', '')}.")
        elif is_dataclass(child):
            _check_ranges(child, f"{name}.")
        elif isinstance(child, Mapping) and any(number <= 0 for number in child.values()):
            raise PerennialError(f"--{name} is {dict(child)}, but its numbers must be above 0.")
        elif f.name == "betas" and not all(0 <= beta < 1 for beta in child):
            raise PerennialError(f"--{name} is {child}, but both must be at least 0 and below 1.")
        elif isinstance(child, bool):
            continue
        elif isinstance(child, int | float) and (child < 0 or (child == 0 and f.name not in zero)):
            least = "0 or more" if f.name in zero else "above 0"
            raise PerennialError(f"--{name} is {child}, but it must be {least}.")


def to_json(value: Any) -> Any:
    """`value` as JSON: dataclasses become objects, those that come in kinds with their `name`."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {"name": _kind(value)} if isinstance(value, Objective | Strategy) else {}
        return named | {f.name: to_json(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def _kind(part: Objective | Strategy) -> str:
    """The name by which `discovery.find` finds the class of `part` again: its own, or that of its module."""
    known = discovery.names("learning" if isinstance(part, Objective) else "strategies")
    return part.name if part.name in known else type(part).__module__


def preset(name: str) -> Config:
    """The preset called `name`.

    Raises:
        PerennialError: there is none; the nearest names are listed.
    """
    return discovery.value("presets", name, "CONFIG", Config)
