"""Refuses a run that needs more memory than there is, before its weights are loaded."""

from __future__ import annotations

import psutil
import torch

from perennial.config import Config
from perennial.errors import PerennialError
from perennial.planning import estimate
from perennial.planning.gpus import RESERVED
from perennial.planning.reading import option, read_anatomy, use_of


def check_memory(config: Config, room: float | None = None) -> None:
    """See that `config` fits into `room` bytes, by default those that are free on its device.

    A policy that does not describe its network is not checked, nor is a checkpoint that cannot be read: loading says
    better what is wrong with it.

    Raises:
        PerennialError: it does not fit; says what would.
    """
    try:
        _, anatomy = read_anatomy(config)
    except PerennialError:
        return
    device = config.policy.device
    use = use_of(config, anatomy, on_cpu=device == "cpu")
    if room is None:
        room = _free(device)
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
    raise PerennialError(f"{problem}; it fits with {switches}, which needs {lighter / 1e9:.3g} GB.")


def _free(device: str) -> float:
    if device == "cpu":
        return float(psutil.virtual_memory().available)
    return float(torch.cuda.mem_get_info(device)[0]) - RESERVED
