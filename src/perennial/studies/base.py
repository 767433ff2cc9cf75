"""What a study is: a grid of ordinary runs that differ in method, order of tasks and seed, and in nothing else.

A module of this room holds one study as `STUDY`. Every run of it is a `perennial run` of the study's preset with
overrides, so each number of a study can be made again by one command.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from perennial import config as configuration
from perennial import discovery, overrides
from perennial.config import Config
from perennial.errors import PerennialError, unknown

FOLDER = "{folder}"
"""Stands for the study's own folder in overrides and preparations, so that a study does not depend on its place."""
GIVEN = "given"
"""The order of tasks that the preset has."""


@dataclass(frozen=True)
class Method:
    """One way to go through the tasks.

    Attributes:
        overrides: dotted settings that make it, as on the command line of `perennial run`.
        section: heading under which reports list it.
        orders: names of the orders of tasks in which it is run.
        published: metric -> number in percentage points that the study's source reports for it.
        published_form: how what they did differs, where they belong to another form of the method.
    """

    overrides: Mapping[str, str] = field(default_factory=dict)
    section: str = "strategies"
    orders: tuple[str, ...] = (GIVEN,)
    published: Mapping[str, float] = field(default_factory=dict)
    published_form: str = ""


@dataclass(frozen=True)
class Preparation:
    """Something that runs need beforehand, such as demonstrations: made once by one command.

    Attributes:
        path: the folder that the command makes, within the study's; it is complete once it has a manifest.
        arguments: of `perennial`; `{folder}` stands for the study's folder.
        needed_by: methods that need it, only "*" for all.
    """

    path: str
    arguments: tuple[str, ...]
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A grid of runs.

    Attributes:
        description: one line for reports.
        preset: that every run starts from.
        methods: by name.
        reference: the method that others are compared with.
        seeds: that every method is run with.
        orders: name -> trained tasks other than the preset's, or in another order, for methods that ask for it.
        pooled: those of `orders` that teach different tasks to the same end; the protocol table has one line for each
            method, the mean over these. Empty: there is no such table.
        overrides: settings that all runs share.
        preparations: made before the runs, in this order.
        source: where the published numbers come from, in words.
    """

    description: str
    preset: str
    methods: Mapping[str, Method]
    reference: str = "sequential"
    seeds: tuple[int, ...] = (0, 1, 2)
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pooled: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    preparations: tuple[Preparation, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Entry:
    """One run of a study's grid."""

    study: Study
    method: str
    order: str
    seed: int

    @property
    def row(self) -> str:
        """The line of the study's tables that the run belongs to: its method, and its order where not the given one."""
        return self.method if self.order == GIVEN else f"{self.method}-{self.order}"

    @property
    def name(self) -> str:
        """Unique within the study, and a relative path."""
        return f"{self.row}/seed{self.seed}"

    @cached_property
    def overrides(self) -> dict[str, str]:
        """Dotted settings on top of the preset, with `{folder}` left in."""
        order = {} if self.order == GIVEN else {"tasks.trained": ",".join(self.study.orders[self.order])}
        return {**self.study.overrides, **order, **self.study.methods[self.method].overrides, "seed": str(self.seed)}

    def config(self) -> Config:
        """The configuration, with `{folder}` left in."""
        return overrides.apply(configuration.preset(self.study.preset), self.overrides)  # type: ignore[no-any-return]

    def arguments(self, folder: Path) -> list[str]:
        """What `perennial` is given to start the run, for the study in `folder`."""
        options = [part for key, value in self.overrides.items() for part in (f"--{key}", value)]
        filled = [option.replace(FOLDER, str(folder)) for option in options]
        return ["run", self.study.preset, "--run-dir", str(folder / "runs" / self.name), *filled]

    def command(self) -> str:
        """The run as a person would type it in the study's folder."""
        return shlex.join(["perennial", *(part.replace(f"{FOLDER}/", "") for part in self.arguments(Path(FOLDER)))])

    def matches(self, found: Mapping[str, Any]) -> bool:
        """Whether a run with the configuration `found`, `{folder}` left in, is this one, whatever machine made it.

        Settings that Perennial did not have when the run was made do not count.
        """
        settled = configuration.settled(self.config())  # as a run writes it down
        wanted = without_place(configuration.to_json(settled), Path(FOLDER))
        free = ("workers", "threads", "description")
        return all(_agree(found[key], wanted.get(key)) for key in found if key not in free)


def _agree(found: Any, wanted: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return all(key in wanted and (_agree(found[key], wanted[key]) or _decided(key, wanted[key])) for key in found)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_agree, found, wanted))
    return bool(found == wanted)


def _decided(key: str, wanted: Any) -> bool:
    """Whether the setting was left open, for the run to decide by the free memory."""
    return key == "micro_batch" and wanted is None


def without_place(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of a run with `{folder}` for the study's folder, where a text is a path in it."""
    place = str(folder.absolute())

    def placeless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: placeless(item) for key, item in value.items()}
        if isinstance(value, list):
            return [placeless(item) for item in value]
        inside = isinstance(value, str) and f"{value}/".startswith(f"{place}/")
        return FOLDER + value[len(place) :] if inside else value

    return {key: placeless(value) for key, value in config.items()}


def find(name: str) -> Study:
    """The study called `name`.

    Raises:
        PerennialError: there is none; the nearest names are listed.
    """
    return discovery.value("studies", name, "STUDY", Study)


def grid(study: Study, methods: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Entry]:
    """The runs of the chosen `methods` and `seeds`, by default all: seed by seed, other orders of tasks last in each.

    Raises:
        PerennialError: a method or seed is not in the study, or the study's names clash.
    """
    for method in methods:
        if method not in study.methods:
            raise unknown("method of the study", method, study.methods)
    for seed in seeds:
        if seed not in study.seeds:
            raise PerennialError(
                f"Seed {seed} is not in the study, which has {', '.join(map(str, study.seeds))}; choose among these."
            )
    entries = [
        Entry(study, method, order, seed)
        for seed in seeds or study.seeds
        for given in (True, False)
        for method in methods or study.methods
        for order in study.methods[method].orders
        if (order == GIVEN) is given
    ]
    _check(study, entries)
    return entries


def _check(study: Study, entries: Sequence[Entry]) -> None:
    """No two runs share a name, and every run is one that could start, as far as files are not needed to tell."""
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise PerennialError(f"Two runs of the study are called {name!r}; rename a method or an order.")
        if (
            not all(part.isprintable() and part not in ("", ".", "..") for part in name.split("/"))
            or name.count("/") > 1
        ):
            raise PerennialError(f"The study has a run called {name!r}, which cannot be a folder; rename the method.")
    if study.reference not in study.methods:
        raise unknown("method of the study", study.reference, study.methods)
    for entry in entries:
        for key in study.methods[entry.method].overrides:
            if key.split(".")[0] in ("evaluation", "seed", "tasks"):
                raise PerennialError(
                    f"The method {entry.method!r} sets {key}, which must be the same in all runs that are compared; "
                    "set it in the overrides of the study."
                )
        if entry.order != GIVEN and entry.order not in study.orders:
            raise unknown(f"order of tasks for {entry.method!r}", entry.order, [GIVEN, *study.orders])
        entry.config()
