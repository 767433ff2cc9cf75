"""Metrics of continual learning on success matrices (definitions of arXiv 2603.11653, equations 2 to 4).

Every function takes rates S, float [..., R, T + H]: leading axes are free (bootstrap resamples, for example), row 0 is
the base checkpoint, row i follows the i-th phase of training, the first T columns are the trained tasks in order and
the other H are held out. It returns float [...] in the unit of S, NaN where a needed cell is missing, or None where the
metric is not defined for such a matrix; it is never 0 by default. All metrics are linear in S.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, int], np.ndarray | None]


def avg(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """Average success on the `trained` first tasks after all training: mean_j S[T, j]."""
    return _mean(rates[..., -1, :trained])


def gain(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """What training added to AVG: mean_j (S[T, j] - S[0, j])."""
    return _mean(rates[..., -1, :trained] - rates[..., 0, :trained])


def nbt(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """Negative backward transfer, or forgetting: mean_{j < T} (S[j, j] - S[T, j]); below 0 if old tasks got better.

    Undefined for a single task and for joint training, where no row follows each task.
    """
    if not _task_by_task(rates, trained):
        return None
    earlier = np.arange(1, trained)
    return _mean(rates[..., earlier, earlier - 1] - rates[..., -1, : trained - 1])


def fwt(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """Forward transfer: mean_{j > 1} (S[j - 1, j] - S[0, j]), the gain on a task just before it is trained.

    Undefined where `nbt` is.
    """
    if not _task_by_task(rates, trained):
        return None
    later = np.arange(1, trained)
    return _mean(rates[..., later, later] - rates[..., 0, 1:trained])


def zs(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """Zero-shot success, on held-out tasks after all training: mean_h S[T, h]; undefined without held-out tasks."""
    return _mean(rates[..., -1, trained:])


def zs_gain(rates: np.ndarray, trained: int) -> np.ndarray | None:
    """What training added to ZS: mean_h (S[T, h] - S[0, h]); undefined without held-out tasks."""
    return _mean(rates[..., -1, trained:] - rates[..., 0, trained:])


METRICS: dict[str, Metric] = {"avg": avg, "gain": gain, "nbt": nbt, "fwt": fwt, "zs": zs, "zs_gain": zs_gain}
RATES = ("avg", "zs")
"""Those that are rates, in [0, 1] if S is; the others are differences of rates, in [-1, 1]."""


def _mean(values: np.ndarray) -> np.ndarray | None:
    """Mean over the tasks, undefined without any."""
    return np.asarray(values.mean(axis=-1)) if values.shape[-1] else None


def _task_by_task(rates: np.ndarray, trained: int) -> bool:
    """Whether there are at least two trained tasks and one row after each."""
    return trained > 1 and rates.shape[-2] == trained + 1
