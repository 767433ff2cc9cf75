"""Finds suites, policies, strategies, recipes and presets by looking at files; there is no registry to edit.

A module `perennial/<room>/<name>.py` is the thing called `<name>`. Other packages add theirs by an entry point in the
group `perennial.<room>`. Names are listed without importing anything.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from perennial.errors import PerennialError, unknown

Thing = TypeVar("Thing")

ROOMS = {
    "suites": "suite",
    "policies": "policy",
    "strategies": "strategy",
    "learning": "recipe",
    "presets": "preset",
    "studies": "study",
    "tracking": "tracker",
}
Kind = Literal["suites", "policies", "strategies", "recipes", "presets", "studies", "trackers"]
"""What `perennial list` calls the rooms."""
HELPERS = {"policies": {"lora"}, "learning": {"advantages", "optimizer", "stage"}, "strategies": {"composition"}}
"""Modules of a room that are not choices, beside `base` and names that begin with an underscore."""


def names(room: str) -> dict[str, str]:
    """Name -> dotted module path of everything found in `room`, own files first, sorted."""
    package = importlib.import_module(f"perennial.{room}")
    found = {
        module.name: f"perennial.{room}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if module.name != "base" and module.name not in HELPERS.get(room, ()) and not module.name.startswith("_")
    }
    for entry_point in importlib.metadata.entry_points(group=f"perennial.{room}"):
        found.setdefault(entry_point.name, entry_point.value)
    return dict(sorted(found.items()))


def load(room: str, name: str) -> ModuleType:
    """Import the module called `name` in `room`; a dotted name is imported as it is.

    Raises:
        PerennialError: there is no such module; the nearest names are listed.
    """
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but not something that it needs
            raise PerennialError(f"There is no module {name!r} for a {ROOMS[room]}; check its dotted name.") from error
    found = names(room)
    if name not in found:
        raise unknown(ROOMS[room], name, found)
    return importlib.import_module(found[name])


def describe(path: str) -> str:
    """The first line of the docstring of the module at dotted `path`, read without importing it."""
    spec = importlib.util.find_spec(path)
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def find(room: str, name: str, base: type[Thing]) -> type[Thing]:
    """The class derived from `base` that the module `name` in `room` defines itself.

    In `name:argument`, the argument becomes the attribute `argument` of a class that declares one.

    Raises:
        PerennialError: there is no such module, it defines no such class, or its class takes no argument.
    """
    name, _, argument = name.partition(":")
    module = load(room, name)
    for value in vars(module).values():
        if not isinstance(value, type) or inspect.isabstract(value) or value.__module__ != module.__name__:
            continue
        if issubclass(value, base):
            if not argument:
                return value
            if not hasattr(value, "argument"):
                raise PerennialError(f"The {ROOMS[room]} {name!r} takes nothing after a colon; leave {argument!r} out.")
            return type(value.__name__, (value,), {"argument": argument})
    raise PerennialError(
        f"The module {name!r} is no {ROOMS[room]}, as it defines no class derived from {base.__name__}; "
        "choose one that does."
    )


def value(room: str, name: str, attribute: str, kind: type[Thing]) -> Thing:
    """The `attribute` of the module `name` in `room`, which makes it a thing of that room.

    Raises:
        PerennialError: there is no such module, or it has no such attribute of that type.
    """
    found = getattr(load(room, name), attribute, None)
    if not isinstance(found, kind):
        raise PerennialError(
            f"The module {name!r} is no {ROOMS[room]}, as it has no {attribute} of type {kind.__name__}; "
            "choose one that has."
        )
    return found
