"""What `perennial plan` can be told; nothing heavy is imported before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional


@dataclass(frozen=True)
class Plan:
    """Say what memory and time a run would take on each type of GPU, before anything is loaded."""

    preset: Annotated[Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Name of a preset, see `perennial list presets`; overrides follow as for `perennial run`."""
    share: float = 0.4
    """Assumed share of a GPU's matrix rate that acting and learning achieve."""
    steps_per_second: float = 0.0
    """Environment steps of one worker; 0 takes what was measured for the suite."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __call__(self, overrides: dict[str, str]) -> None:
        """Count and print."""
        from perennial.planning import command

        command.command(self, overrides, Console())
