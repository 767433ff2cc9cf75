"""Chooses open micro-batches by the free memory, and refuses a run that needs more than there is, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from perennial import machine
from perennial.config import Config
from perennial.errors import PerennialError
from perennial.planning import estimate
from perennial.planning.estimate import Use
from perennial.planning.gpus import RESERVED
from perennial.planning.reading import option, read_anatomy, use_of
from perennial.policies.base import Policy
from perennial.strategies.base import Strategy
from perennial.suites.base import Task


def fit_micro_batches(config: Config, room: float | None = None) -> Config:
    """`config` with every micro-batch decided: those left open are halved until the run fits into `room` bytes.

    Which one it became is part of what a run does, as it decides how gradients are rounded. Of a policy that does not
    describe its network, nothing is known, and the most is taken.
    """
    use = _use(config)
    rows = [stage.optimizer.rows for stage in config.recipe]
    if use is not None:
        room = _free(config.policy.device) if room is None else room
        rows = [stage.rows for stage in estimate.fitted(use, room).stages]
    decided = zip(config.recipe, rows, strict=True)
    recipe = tuple(replace(stage, optimizer=replace(stage.optimizer, micro_batch=each)) for stage, each in decided)
    return replace(config, recipe=recipe)


def check_memory(config: Config, room: float | None = None, begun: bool = False) -> None:
    """See that `config` fits into `room` bytes, by default those that are free on its device.

    A policy that does not describe its network is not checked, nor is a checkpoint that cannot be read: loading says
    better what is wrong with it. A run that has `begun` cannot be given other options any more.

    Raises:
        PerennialError: it does not fit; says what would.
    """
    use = _use(config)
    if use is None:
        return
    device = config.policy.device
    if room is None:
        room = _free(device)
    use = estimate.fitted(use, room)
    chosen = estimate.switches(use, room)
    if chosen == ():
        return
    needed = estimate.memory(use).peak
    problem = f"The run needs {needed / 1e9:.3g} GB of memory on {device}, but {max(room, 0) / 1e9:.3g} GB are free"
    if chosen is None:
        least = [use, *(lighter for _, lighter in estimate.remedies(use))][-1]
        raise PerennialError(
            f"{problem}, and no switch brings it below {estimate.memory(least).peak / 1e9:.3g} GB; free some, or take "
            "one of the machines that `perennial plan` names."
        )
    lighter = estimate.memory(estimate.apply(use, chosen)).peak
    switches = " ".join(option(config, switch) for switch in chosen)
    advice = "free some, or start a new run with" if begun else "it fits with"
    raise PerennialError(f"{problem}; {advice} {switches}, which needs {lighter / 1e9:.3g} GB.")


def check_buffers(
    strategies: Sequence[Strategy], tasks: Sequence[Task], policy: Policy, room: float | None = None
) -> None:
    """See that all that the strategies keep of `tasks` fits into `room` bytes, by default what is free on its device.

    Of decisions only the images of one camera are counted, which are most of them, and the choices.

    Raises:
        PerennialError: it does not.
    """
    needed: dict[torch.device, dict[str, int]] = {}
    for strategy in strategies:
        for task in tasks:
            for device, size in strategy.kept(task, policy).items():
                shares = needed.setdefault(device, {})
                shares[strategy.name] = shares.get(strategy.name, 0) + size
    for device, shares in needed.items():
        free = _free(str(device)) if room is None else room
        if sum(shares.values()) > free:
            parts = " and ".join(f"{name!r} {size / 1e9:.3g} GB" for name, size in shares.items())
            raise PerennialError(
                f"Of {len(tasks)} tasks strategies may keep more than the {max(free, 0) / 1e9:.3g} GB that are free on "
                f"{device}: {parts} at least; let them keep fewer decisions, or learn an adapter, not all weights."
            )


def _use(config: Config) -> Use | None:
    """How the run uses its network, where that is known."""
    try:
        _, anatomy = read_anatomy(config)
    except PerennialError:
        return None
    return use_of(config, anatomy, on_cpu=config.policy.device == "cpu")


def _free(device: str) -> float:
    if device == "cpu":
        return float(machine.free_memory())
    return float(torch.cuda.mem_get_info(device)[0]) - RESERVED
