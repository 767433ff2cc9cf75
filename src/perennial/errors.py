"""The one exception that users see: a sentence that says what is wrong, with which value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerennialError(Exception):
    """A mistake of the user or of the machine. The CLI prints its sentence and exits with `exit_code`."""

    exit_code = 2


class LearningError(PerennialError):
    """Learning or playing cannot go on: NaN, a worker that keeps dying. What a run committed before is intact."""

    exit_code = 3


APART = ("libero", "maniskill")
"""Extras that get an environment of their own: LIBERO's brings a torchvision that breaks transformers on CPU torch."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra, or what is always needed.

    Perennial is not on PyPI, where its name belongs to another project: `pip install perennial` gets that one.
    """
    if extra in APART:
        return (
            f"`make setup-{extra}` in the folder of Perennial's source and then .venv-{extra}/bin/perennial, as it has "
            "an environment of its own (docs/suites.md says why, and how to make one elsewhere)"
        )
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install -c constraints.txt -e {what} in the folder of Perennial's source"


def not_installed(what: str, extra: str, error: ImportError) -> PerennialError:
    """The error for `what` that cannot be imported because a library of `extra` is missing or broken."""
    return PerennialError(f"{what} cannot be imported ({error}); run {how_to_install(extra)}.")


def unknown(kind: str, name: str, known: Iterable[str]) -> PerennialError:
    """The error for a name that does not exist: it lists the nearest ones, or all if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names) or 'none'}."
    return PerennialError(f"There is no {kind} {name!r}. {hint}")
