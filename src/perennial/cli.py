"""The command line: finds the command, parses its options and calls it.

perennial run demo --seed 1 --recipe.grpo.groups 8
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, TypeVar, Union, get_args, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape

from perennial import __version__
from perennial.commands import COMMANDS, Run
from perennial.errors import PerennialError, unknown
from perennial.planning.options import Plan

errors = Console(stderr=True)

Command = TypeVar("Command")
POSITIONAL = get_args(tyro.conf.Positional[str])[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error of the user's becomes one sentence on standard error and a non-zero exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not take the workers' cores
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(__version__)
        return
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PerennialError as error:
        errors.print(f"[red]perennial:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("[red]perennial:[/red] Stopped at once; what was committed is safe.", soft_wrap=True)
        sys.exit(130)


def _dispatch(arguments: list[str]) -> None:
    """Parse `arguments` and call the command they name."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    _require_preset_first(arguments)
    choices: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007
    command, rest = tyro.cli(
        choices,
        args=arguments,
        prog="perennial",
        description="Teach a robot policy one skill after another, and see what it learned and forgot.",
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        return_unknown_args=True,
    )
    command = tidied(command)
    if isinstance(command, Run | Plan):
        command(pairs(rest))
    elif rest:
        raise unknown(f"option of `perennial {arguments[0]}`", rest[0], _options(type(command)).values())
    else:
        command()


def _require_preset_first(arguments: list[str]) -> None:
    """Overrides cannot be told from a preset that follows them."""
    kind = COMMANDS.get(arguments[0]) if len(arguments) > 1 else None
    option = arguments[1].partition("=")[0] if kind in (Run, Plan) else ""
    if kind is not None and option.startswith("--") and option not in ("--help", *_options(kind).values()):
        raise PerennialError(
            f"The name of a preset comes before overrides, as in `perennial {arguments[0]} demo --seed 1`, but the "
            f"first argument is {option}."
        )


def _options(kind: type) -> dict[str, str]:
    """Field of a command -> the option that sets it, as it is typed."""
    found: dict[str, str] = {}
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        marks = getattr(hints[f.name], "__metadata__", ())
        named = next((mark.name for mark in marks if getattr(mark, "name", None)), f.name.replace("_", "-"))
        if POSITIONAL not in marks:
            found[f.name] = f"--{named}"
    return found


def tidied(command: Command) -> Command:
    """`command` with lists of names split at commas too, and every name in them once.

    Raises:
        PerennialError: a number is NaN or infinite.
    """
    changes: dict[str, Any] = {}
    for name, option in _options(type(command)).items():
        value = getattr(command, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise PerennialError(f"{option} is {value}, but it must be a finite number.")
        if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
            names = [part.strip() for item in value for part in item.split(",")]
            changes[name] = tuple(dict.fromkeys(filter(None, names))) or value
    return replace(command, **changes)  # type: ignore[type-var]


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`--a.b 1 --c=2 --d x y` as {"a.b": "1", "c": "2", "d": "x,y"}.

    Raises:
        PerennialError: an option without a value, or a value without an option.
    """
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise PerennialError(f"{option!r} is not an option; overrides look like --recipe.grpo.groups 8.")
        key, equals, value = option[2:].partition("=")
        if not equals:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise PerennialError(f"{option} has no value; overrides look like --recipe.grpo.groups 8.")
            value = ",".join(values)
        found[key] = value
    return found


if __name__ == "__main__":
    main()
