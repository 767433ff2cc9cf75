"""How much a configuration has its network do."""

from __future__ import annotations

import math

from perennial import discovery
from perennial.config import Config
from perennial.planning.estimate import Work
from perennial.planning.reading import decisions, horizons
from perennial.session import cells, played_in
from perennial.suites.base import Suite


def work_of(config: Config, steps: int) -> Work:
    """What a run of `config` does if every episode lasts to its horizon and every decision has a gradient.

    Args:
        config: of the run.
        steps: environment steps of one decision.
    """
    decided = env_steps = 0
    rows = [0] * len(config.recipe)
    for phase in config.phases:
        for number, stage in enumerate(config.recipe):
            played = decisions(config, stage, phase, steps)
            # Tasks that are learned together share the budget that each of them would have alone.
            times = stage.iterations * (len(phase) if config.schedule == "joint" else 1)
            decided += times * played
            rows[number] += times * stage.rows(played)
            env_steps += times * sum(horizons(config, stage, phase))
    suite = discovery.find("suites", config.suite, Suite)()
    row = [(played_in(config, suite, cell), suite.tasks[cell.task].horizon) for cell in cells(config, 0)]
    times = len(config.phases) + 1
    evaluated = times * sum(count * math.ceil(horizon / steps) for count, horizon in row)
    return Work(decided, evaluated, tuple(rows), env_steps + times * sum(count * horizon for count, horizon in row))
