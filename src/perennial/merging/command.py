"""`perennial merge`: checkpoints and adapters into a checkpoint, or one adapter into another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import Progress

from perennial.errors import PerennialError
from perennial.merging.adapter_export import merge_adapters
from perennial.merging.adapters import is_adapter, learned
from perennial.merging.checkpoints import merge_checkpoints
from perennial.merging.state_dicts import require_fraction
from perennial.policies._groups import GROUPS
from perennial.storage.base_checkpoint import SCHEMES, checkpoint_folder

if TYPE_CHECKING:
    from rich.console import Console

    from perennial.commands import Merge


ALPHA = {"linear": 0.8, "slerp": 0.8}
"""Method -> alpha where none is given; of what the others add, all is meant."""
OF_METHOD = {"density": "ties", "drop": "dare", "seed": "dare"}
"""Option -> the method that heeds it."""


def command(options: Merge, console: Console) -> None:
    """Merge, and say what came of it.

    Raises:
        PerennialError: see `merge_checkpoints` and `merge_adapters`; or an option that the merge could not heed.
    """
    own = {group: getattr(options, group) for group in GROUPS}
    by_group = {group: alpha for group, alpha in own.items() if alpha is not None}
    base, *finetuned = map(_folder, (options.base, *options.finetuned))
    alpha = ALPHA.get(options.method, 1.0) if options.alpha is None else options.alpha
    heeded = _heeded(options)
    if is_adapter(learned(base)):
        _adapters(options, alpha, bool(by_group), console)
        return
    if options.rank:
        raise PerennialError(f"--rank is {options.rank}, but {options.base} is no adapter, so the result has no rank.")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("merging", total=None)
        report = merge_checkpoints(
            base,
            finetuned,
            options.out,
            method=options.method,
            alpha=alpha,
            alpha_by_group=by_group,
            extrapolate=options.extrapolate,
            **heeded,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    alphas = ", ".join(f"{group} {alpha:g}" for group, alpha in sorted(report.alpha_by_group.items()))
    _say(console, f"Of {report.tensors} tensors {report.changed} differed; alpha: {alphas}.")
    if report.left_out:
        _say(console, f"Left out, as they hold weights in another format: {', '.join(report.left_out)}.")
    _say(console, f"Merged checkpoint: {options.out}")


def _heeded(options: Merge) -> dict[str, Any]:
    """The given options that belong to one method.

    Raises:
        PerennialError: it is another method.
    """
    given = {name: getattr(options, name) for name in OF_METHOD if getattr(options, name) is not None}
    for name, value in given.items():
        if OF_METHOD[name] != options.method:
            raise PerennialError(
                f"--{name} is {value}, but it says how {OF_METHOD[name]} merges and --method is {options.method}; "
                f"leave it out, or set --method {OF_METHOD[name]}."
            )
    return given


def _folder(path: Path) -> Path:
    """`path`, or the folder that a name such as bundled:metaworld-small stands for."""
    return checkpoint_folder(str(path)) if str(path).startswith(SCHEMES) else path


def _adapters(options: Merge, alpha: float, grouped: bool, console: Console) -> None:
    """(1 - n alpha) of the first adapter's update and alpha of each of n others."""
    count = len(options.finetuned)
    if grouped or options.method not in ("linear", "task_arithmetic"):
        raise PerennialError(
            f"{options.base} is an adapter, and adapters are merged with each other by one alpha and the method linear "
            "or task_arithmetic; give a checkpoint as the base for the rest."
        )
    if options.method == "linear" and count != 1:
        raise PerennialError(f"The method linear merges one adapter into another, not {count}; use task_arithmetic.")
    require_fraction(alpha, "alpha", options.extrapolate)
    weights = [1 - count * alpha, *[alpha] * count]
    folders = [learned(path) for path in (options.base, *options.finetuned)]
    report = merge_adapters(folders, options.out, weights=weights, rank=options.rank or None)
    error = f"relative error {report.residual:.2g}" if options.rank else "exact"
    _say(console, f"Merged adapter: {options.out} (rank {report.rank}, {error})")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
