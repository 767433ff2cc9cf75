"""How much a configuration has its network do."""

from __future__ import annotations

import math

from perennial import discovery
from perennial.config import Config
from perennial.planning.estimate import Work
from perennial.session import cells
from perennial.suites.base import Suite


def work_of(config: Config, steps: int) -> Work:
    """What a run of `config` does if every episode lasts to its horizon and every decision has a gradient.

    Args:
        config: of the run.
        steps: environment steps of one decision.
    """
    suite = discovery.find("suites", config.suite, Suite)()
    decisions = rows = env_steps = 0
    for phase in config.phases:
        tasks = tuple(suite.tasks[name] for name in phase)
        for stage in config.recipe:
            horizons = [suite.tasks[one.task].horizon for one in stage.episodes(tasks, ("count", 0))]
            played = sum(math.ceil(horizon / steps) for horizon in horizons)
            # Tasks that are learned together share the budget that each of them would have alone.
            times = stage.iterations * (len(phase) if config.schedule == "joint" else 1)
            decisions += times * played
            rows += times * stage.rows(played)
            env_steps += times * sum(horizons)
    row = [suite.tasks[cell.task].horizon for cell in cells(config, 0)]
    played = (len(config.phases) + 1) * config.evaluation.episodes
    evaluated = played * sum(math.ceil(horizon / steps) for horizon in row)
    return Work(decisions, evaluated, rows, env_steps + played * sum(row))
