"""What there is to choose from, what each choice is, and what it can be set to: `perennial list`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from perennial import discovery, overrides
from perennial.discovery import Kind

OTHERWISE: dict[str, str] = {"recipes": "learning", "trackers": "tracking"}
ROOMS: dict[Kind, str] = {kind: OTHERWISE.get(kind, kind) for kind in get_args(Kind)}
"""Where the choices of each kind are found."""


def all_of(kind: Kind) -> list[dict[str, str]]:
    """The name and the first line of the description of everything of this kind; nothing is imported."""
    found = discovery.names(ROOMS[kind])
    return [{"name": name, "description": discovery.describe(path)} for name, path in found.items()]


def about(kind: Kind, name: str) -> dict[str, Any]:
    """One choice as JSON: its name, its description in full, and lists of what can be set or is inside.

    Raises:
        PerennialError: there is none of this name (the nearest are listed), or it needs a package that is missing.
    """
    of_class, lists = ABOUT[kind](name)
    texts = (discovery.load(ROOMS[kind], name.partition(":")[0]).__doc__, of_class)
    return {"name": name, "description": "\n\n".join(inspect.cleandoc(text) for text in texts if text), **lists}


def show(found: Sequence[Mapping[str, str]] | Mapping[str, Any], console: Console) -> None:
    """Print what `all_of` or `about` gave."""
    if not isinstance(found, Mapping):
        for one in found:
            console.print(f"[bold]{one['name']}[/bold]  {one['description']}", highlight=False)
        return
    console.print(found["name"], style="bold")
    for line in unwrapped(found["description"]).splitlines():
        entry = line.lstrip()
        console.print(Padding.indent(entry or " ", len(line) - len(entry)), highlight=False, markup=False)
    for heading, rows in found.items():
        if isinstance(rows, Mapping):
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for key, value in rows.items():
                grid.add_row(key, value)
            console.print(f"\n{heading}", style="bold")
            console.print(grid, highlight=False, markup=False)


def unwrapped(text: str) -> str:
    """The paragraphs of a docstring, each on one line; indented entries keep lines of their own."""
    return re.sub(r"(?<=\S)\n(?=\S| {8})\s*(?!- )", " ", text)


Lists = dict[str, dict[str, str]]
"""Heading -> entry -> what it is or is set to."""


def _suite(name: str) -> tuple[str | None, Lists]:
    from perennial.suites.base import Suite

    suite = discovery.find("suites", name, Suite)()
    sequences = {}
    for key, sequence in suite.sequences.items():
        sequences[key] = f"{_typed(sequence.trained)}; held out: {_typed(sequence.held_out)}"
    tasks = {key: task.evaluation_instruction for key, task in suite.tasks.items()}
    return type(suite).__doc__, {"variants": dict.fromkeys(suite.variants, ""), "sequences": sequences, "tasks": tasks}


def _policy(name: str) -> tuple[str | None, Lists]:
    from perennial.policies.base import Policy

    return discovery.find("policies", name, Policy).__doc__, {}


def _strategy(name: str) -> tuple[str | None, Lists]:
    from perennial.strategies.base import Strategy

    strategy = discovery.find("strategies", name, Strategy)()
    return type(strategy).__doc__, {"settings": _options(strategy, f"strategies.{name}.")}


def _recipe(name: str) -> tuple[str | None, Lists]:
    from perennial.learning.base import Objective

    recipe = discovery.find("learning", name, Objective)()
    return type(recipe).__doc__, {"settings": _options(recipe, f"recipe.{name}.")}


def _preset(name: str) -> tuple[str | None, Lists]:
    from perennial.config import preset

    return None, {"settings": _options(preset(name), "")}


def _study(name: str) -> tuple[str | None, Lists]:
    from perennial.studies.base import find, grid

    study = find(name)
    methods = {
        key: " ".join(f"--{option} {value}" for option, value in method.overrides.items())
        for key, method in study.methods.items()
    }
    size = {"preset": study.preset, "seeds": _typed(study.seeds), "runs": str(len(grid(study)))}
    return None, {"grid": size, "methods": methods}


def _tracker(name: str) -> tuple[str | None, Lists]:
    from perennial.tracking.base import Tracker

    return discovery.find("tracking", name, Tracker).__doc__, {}


ABOUT: dict[Kind, Callable[[str], tuple[str | None, Lists]]] = {
    "suites": _suite,
    "policies": _policy,
    "strategies": _strategy,
    "recipes": _recipe,
    "presets": _preset,
    "studies": _study,
    "trackers": _tracker,
}


def _options(chosen: Any, prefix: str) -> dict[str, str]:
    """Option of `perennial run` -> its present value, as it is typed."""
    return {f"--{key}": _typed(value) for key, value in overrides.keys(chosen, prefix).items()}


def _typed(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_typed, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_typed(each)}" for key, each in value.items())
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
