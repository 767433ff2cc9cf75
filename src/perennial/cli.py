"""The command line: finds the command, parses its options and calls it.

perennial run demo --seed 1 --recipe.grpo.groups 8
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.markup import escape

from perennial import __version__
from perennial.commands import COMMANDS, Run
from perennial.errors import PerennialError, unknown
from perennial.planning.options import Plan

errors = Console(stderr=True)


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
    choices: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007
    command, rest = tyro.cli(
        choices,
        args=arguments,
        prog="perennial",
        description="Teach a robot policy one skill after another, and see what it learned and forgot.",
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        return_unknown_args=True,
    )
    if isinstance(command, Run | Plan):
        command(pairs(rest))
    elif rest:
        options = [f"--{f.name.replace('_', '-')}" for f in fields(command)]
        raise unknown(f"option of `perennial {arguments[0]}`", rest[0], options)
    else:
        command()


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`--a.b 1 --c=2` as {"a.b": "1", "c": "2"}.

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
            if not rest:
                raise PerennialError(f"{option} has no value; overrides look like --recipe.grpo.groups 8.")
            value = rest.pop(0)
        found[key] = value
    return found


if __name__ == "__main__":
    main()
