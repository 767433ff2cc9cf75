"""What a configuration asks of its network: sizes, and how they are used."""

from __future__ import annotations

import math
from pathlib import Path

from perennial import discovery
from perennial.config import Config
from perennial.errors import PerennialError
from perennial.learning.base import Objective
from perennial.planning.estimate import MICRO_BATCH, Stage, Use
from perennial.policies._anatomy import Anatomy
from perennial.policies.base import Policy
from perennial.rollout.workers import sized
from perennial.storage.base_checkpoint import checkpoint_folder
from perennial.strategies.composition import Strategies
from perennial.suites.base import Suite


def read_anatomy(config: Config) -> tuple[Path | None, Anatomy]:
    """The folder of the checkpoint, None where it is not on this machine, and the sizes of the network.

    Raises:
        PerennialError: the checkpoint is damaged, or the policy says nothing of its network.
    """
    checkpoint = config.policy.checkpoint
    folder = None
    try:
        folder = checkpoint_folder(checkpoint)
    except PerennialError:
        if checkpoint.startswith("bundled:") or Path(checkpoint).is_dir():
            raise
    policy = discovery.find("policies", config.policy.name, Policy)
    suite = discovery.find("suites", config.suite, Suite)()
    said = max((text for name in config.tasks.trained for text in suite.tasks[name].instructions), key=len)
    try:
        return folder, policy.anatomy(folder, said)
    except NotImplementedError:
        raise PerennialError(
            f"The policy {config.policy.name!r} does not describe its network, so nothing can be counted; give its "
            "class an `anatomy`, or plan another policy."
        ) from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise PerennialError(
            f"The sizes of {checkpoint!r} cannot be read ({error!r}); choose a checkpoint of {config.policy.name!r}."
        ) from error


def use_of(config: Config, anatomy: Anatomy, on_cpu: bool = False) -> Use:
    """How a run of `config` uses the network."""
    adapter = config.policy.adapter
    workers = sized(config.workers)
    return Use(
        anatomy=anatomy,
        rank=adapter.rank if adapter else None,
        rank_by_group=tuple(adapter.rank_by_group.items()) if adapter else (),
        dtype=config.policy.dtype or anatomy.dtype,
        recompute=config.policy.checkpointing,
        stages=tuple(_stage(config, stage, anatomy.steps) for stage in config.recipe),
        slots=workers.slots,
        actors=workers.count if workers.backend == "process" else 1,
        shared=on_cpu,
        lent=workers.backend == "shared",
        lendable=Strategies(config.strategies).chooser is None,
    )


def _stage(config: Config, stage: Objective, steps: int) -> Stage:
    """The updates of `stage`."""
    step = max(stage.step_rows(decisions(config, stage, phase, steps)) for phase in config.phases)
    return Stage(stage.optimizer.rows, step, stage.learns, open=stage.optimizer.micro_batch is None)


def decisions(config: Config, stage: Objective, phase: tuple[str, ...], steps: int) -> int:
    """Decisions that `stage` plays for one update in `phase` if every episode lasts to its horizon."""
    return sum(math.ceil(horizon / steps) for horizon in horizons(config, stage, phase))


def horizons(config: Config, stage: Objective, phase: tuple[str, ...]) -> list[int]:
    """Environment steps of the episodes that `stage` plays for one update in `phase`."""
    suite = discovery.find("suites", config.suite, Suite)()
    tasks = tuple(suite.tasks[name] for name in phase)
    return [suite.tasks[episode.task].horizon for episode in stage.episodes(tasks, ("count", 0))]


def option(config: Config, switch: str) -> str:
    """A switch of `estimate.remedies` as it is written on the command line for `config`.

    A micro-batch is named for the stages whose own is larger.
    """
    name, value = switch.split()
    if name != MICRO_BATCH:
        return switch
    larger = dict.fromkeys(stage.name for stage in config.recipe if stage.optimizer.rows > int(value))
    return " ".join(f"{name.replace('*', stage)} {value}" for stage in larger)
