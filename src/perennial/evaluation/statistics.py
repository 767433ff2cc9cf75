"""How sure the numbers are: 95 % intervals for rates and metrics.

One cell has a Wilson score interval. The metrics of one run have a bootstrap over evaluation initial states, paired: a
resampled state brings its outcomes in all rows with it.

Metrics of several runs have the hull of two intervals. A crossed bootstrap (Owen 2007, Annals of Applied Statistics 1)
resamples the states, which all runs share, and the runs; of n runs it sees only (n - 1) / n of the variance between
them, and percentiles know nothing of how badly few runs tell it. Student's t interval of the n values, with n - 1
degrees of freedom, does, but knows nothing of what the runs share. Where runs differ a lot, two or three of them give
wide intervals: then no more is known.

A plain bootstrap of 40 successes in 40 episodes gives an interval of width zero. As Agresti and Min (2005, Statistics
in Medicine 24) do for matched pairs, two pseudo-episodes whose outcomes are fair coin flips, independent in each row,
are therefore mixed in, shared out among the tasks that are averaged. They move intervals only, never values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from perennial.errors import PerennialError
from perennial.evaluation.metrics import METRICS, RATES, Metric
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.randomness import Key, stream

CONFIDENCE = 0.95
RESAMPLES = 2000
PSEUDO_EPISODES = 2.0


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: as measured; rates are in [0, 1].
        low, high: 95 % confidence interval.
        n: evaluation episodes behind a cell or a metric of one run; number of runs behind a metric of several.
    """

    value: float
    low: float
    high: float
    n: int


Pair = tuple[SuccessMatrix, SuccessMatrix]
Summary = dict[str, Estimate | None]
"""By metric: avg, gain, nbt, fwt, zs, zs_gain; None where it is undefined or a cell it needs is missing."""
Drawn = tuple[float | None, np.ndarray]
"""A figure as measured, None where it is undefined, and in each of `RESAMPLES` resamples."""
Limits = tuple[float, float]
"""What a figure cannot fall below or rise above."""
_LEVELS: dict[str, Limits] = {name: (0.0 if name in RATES else -1.0, 1.0) for name in METRICS}
_CHANGES: dict[str, Limits] = {name: (low - high, high - low) for name, (low, high) in _LEVELS.items()}


def wilson(successes: int, episodes: int, states: int | None = None) -> Estimate:
    """Success rate of one cell with its Wilson score interval (Wilson 1927, JASA 22); `episodes` is at least 1.

    Where there are fewer initial `states` than episodes, the interval is that of as many episodes as states: episodes
    from one state may all end alike, which is the largest design effect there is (Kish 1965, Survey Sampling, 5.4).
    """
    n, rate = min(states or episodes, episodes), successes / episodes
    squared = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2 / n
    middle = (rate + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (rate * (1 - rate) + squared / 4)) / (1 + squared)
    low, high = min(max(middle - half, 0.0), rate), max(min(middle + half, 1.0), rate)  # at 0 and 1 despite rounding
    return Estimate(rate, low, high, episodes)


def summary(matrix: SuccessMatrix) -> Summary:
    """All metrics of one run, with paired bootstrap intervals over evaluation initial states."""
    resampled = _resampled_rates([matrix], RESAMPLES, ("run",))[0]
    estimates: Summary = {}
    for name, metric in METRICS.items():
        value = _value(metric, matrix)
        spread = _metric(metric, resampled, matrix)
        estimates[name] = None if value is None else _estimate(value, spread, _episodes_behind(metric, matrix))
    return estimates


def summary_of_runs(matrices: Sequence[SuccessMatrix]) -> Summary:
    """Means of all metrics over runs that differ in their seed.

    Raises:
        PerennialError: no run is given, or the runs teach or hold out different tasks.
    """
    if not matrices:
        raise PerennialError("There is no run to summarise; give at least one.")
    if len({(frozenset(m.trained), frozenset(m.held_out)) for m in matrices}) > 1:
        raise PerennialError("The runs teach different tasks, so their mean says nothing; summarise them separately.")
    if len(matrices) == 1:
        return summary(matrices[0])
    return _over_runs([_drawn(matrices)], _LEVELS)


def summary_of_groups(groups: Sequence[Sequence[SuccessMatrix]]) -> Summary:
    """Means over groups of runs, one group for each choice of taught tasks; within a group only the seed differs.

    Groups count alike and are not resampled: the figures are about these tasks. Seeds and states are. The variance
    between runs is pooled over the groups, as in an analysis of variance, so that a group of one
    run takes that of the others.

    Raises:
        PerennialError: there is no group, or one is empty.
    """
    if not groups or not all(groups):
        raise PerennialError("There is no run to summarise; give at least one for each group.")
    return _over_runs([_drawn(matrices) for matrices in groups], _LEVELS)


def difference(first: SuccessMatrix, second: SuccessMatrix) -> Summary:
    """`second` minus `first` in every metric, on the tasks and evaluation initial states that both have.

    Resampled states are the same in both runs. AVG and gain are over the common trained tasks, ZS over the common
    held-out ones; NBT and FWT need both runs to train the same tasks one by one, in whatever order.

    Raises:
        PerennialError: the runs have no task in common.
    """
    pair = _common(first, second)
    estimates: Summary = {}
    for name, (value, spread) in _differences(pair).items():
        count = sum(_episodes_behind(METRICS[name], m) for m in pair)
        estimates[name] = None if value is None else _estimate(value, spread, count)
    return estimates


def mean_difference(pairs: Sequence[Pair]) -> Summary:
    """The mean of `difference` over pairs of runs that share their seed; see `summary_of_runs`, with pairs for runs.

    Raises:
        PerennialError: no pair is given, or the runs of one have no task in common.
    """
    if not pairs:
        raise PerennialError("There is no pair of runs to compare; give at least one.")
    if len(pairs) == 1:
        return difference(*pairs[0])
    return _over_runs([[_differences(_common(*pair)) for pair in pairs]], _CHANGES)


def difference_of_groups(groups: Sequence[Sequence[Pair]]) -> Summary:
    """The mean of `mean_difference` over groups of pairs of runs, see `summary_of_groups`.

    Raises:
        PerennialError: there is no group, or one is empty, or the runs of a pair have no task in common.
    """
    if not groups or not all(groups):
        raise PerennialError("There is no pair of runs to compare; give at least one for each group.")
    return _over_runs([[_differences(_common(*pair)) for pair in pairs] for pairs in groups], _CHANGES)


def student(groups: Sequence[Sequence[float]]) -> float:
    """Half the width of the t interval of a mean over groups of means over runs; 0 where no group has two runs.

    The variance s^2 between runs is pooled over the G groups of n_g runs: t(sum(n_g - 1)) s sqrt(sum(1 / n_g)) / G.

    Args:
        groups: a figure of every run; within a group only the seed differs.
    """
    from scipy.special import stdtrit

    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return 0.0
    variance = sum(float(np.var(group)) * len(group) for group in groups) / freedom
    error = math.sqrt(variance * sum(1 / len(group) for group in groups)) / len(groups)
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error


def _common(first: SuccessMatrix, second: SuccessMatrix) -> Pair:
    """Both runs, on the tasks and evaluation initial states that both have."""
    trained = [task for task in first.trained if task in second.trained]
    held_out = [task for task in first.held_out if task in second.held_out]
    if not trained and not held_out:
        raise PerennialError(
            f"The runs have no task in common: one teaches {', '.join(first.trained)}, the other "
            f"{', '.join(second.trained)}."
        )
    episodes = dict(zip(first.tasks, first.episodes().max(axis=0), strict=True))
    for task, count in zip(second.tasks, second.episodes().max(axis=0), strict=True):
        episodes[task] = min(count, episodes.get(task, count))
    return first.restricted(trained, held_out, episodes), second.restricted(trained, held_out, episodes)


def _drawn(matrices: Sequence[SuccessMatrix]) -> list[dict[str, Drawn]]:
    """Of each run, by metric; the resampled states are the same in all runs."""
    resampled = [_resampled_rates([m], RESAMPLES, ("runs",))[0] for m in matrices]
    return [
        {name: (_value(metric, m), _metric(metric, r, m)) for name, metric in METRICS.items()}
        for r, m in zip(resampled, matrices, strict=True)
    ]


def _differences(pair: Pair) -> dict[str, Drawn]:
    """By metric: second minus first as measured, and in each resample."""
    resampled = _resampled_rates(pair, RESAMPLES, ("difference",))
    found: dict[str, Drawn] = {}
    for name, metric in METRICS.items():
        values = [_value(metric, m) for m in pair]
        spreads = [_metric(metric, r, m) for r, m in zip(resampled, pair, strict=True)]
        value = None if values[0] is None or values[1] is None else values[1] - values[0]
        found[name] = value, spreads[1] - spreads[0]
    return found


def _over_runs(groups: Sequence[Sequence[Mapping[str, Drawn]]], limits: Mapping[str, Limits]) -> Summary:
    """By metric: the mean over groups of the means over their runs, within `limits`."""
    return {name: _mean([[run[name] for run in group] for group in groups], limits[name]) for name in METRICS}


def _mean(groups: Sequence[Sequence[Drawn]], limits: Limits) -> Estimate | None:
    """One metric of `_over_runs`; None if it is undefined in a run."""
    values = [[value for value, _ in group if value is not None] for group in groups]
    if any(len(known) < len(group) for known, group in zip(values, groups, strict=True)):
        return None
    value = float(np.mean([np.mean(group) for group in values]))
    crossed = np.mean([_crossed([spread for _, spread in group]) for group in groups], axis=0)
    found, margin = _estimate(value, crossed, sum(map(len, groups))), student(values)
    low, high = min(found.low, value - margin), max(found.high, value + margin)
    return replace(found, low=max(low, limits[0]), high=min(high, limits[1]))


def _crossed(spreads: Sequence[np.ndarray]) -> np.ndarray:
    """Means over runs, which are resampled; all of them in the same draws of states."""
    runs = len(spreads)
    chosen = stream(0, "bootstrap", "seeds").integers(runs, size=(RESAMPLES, runs))
    return np.asarray(np.stack(spreads)[chosen, np.arange(RESAMPLES)[:, None]].mean(axis=1))


def _resampled_rates(matrices: Sequence[SuccessMatrix], resamples: int, key: Key) -> list[np.ndarray]:
    """Success rates of resampled states, the same states in all rows of all `matrices`: [resamples, rows, tasks] each.

    All matrices have the same columns, in whatever order, and the same number of episodes in each.
    """
    rates = [np.full((resamples, len(m.successes), len(m.tasks)), np.nan) for m in matrices]
    for column, task in enumerate(matrices[0].tasks):
        averaged = len(matrices[0].trained if column < len(matrices[0].trained) else matrices[0].held_out)
        places = [
            (i, row) for i, m in enumerate(matrices) for row in range(len(m.successes)) if task in m.successes[row]
        ]
        if not places:
            continue
        outcomes = np.stack([matrices[i].successes[row][task] for i, row in places]).astype(float)
        rng, states = stream(0, "bootstrap", *key, task), matrices[0].states.get(task)
        drawn = _resample(outcomes, resamples, PSEUDO_EPISODES / averaged, rng, states)
        for (i, row), values in zip(places, drawn.T, strict=True):
            rates[i][:, row, matrices[i].tasks.index(task)] = values
    return rates


def _resample(
    outcomes: np.ndarray, resamples: int, pseudo: float, rng: np.random.Generator, states: int | None = None
) -> np.ndarray:
    """Rates [resamples, rows] of states drawn with replacement from `outcomes` [rows, episodes] and pseudo-episodes.

    A state brings all episodes from it, see `SuccessMatrix.states`, and a pseudo-state as many as a state has.
    """
    rows, episodes = outcomes.shape
    n, each = episodes, np.ones(episodes)
    if states is not None and states < episodes:
        beginning = np.eye(states)[np.arange(episodes) % states]
        n, each, outcomes = states, beginning.sum(0), outcomes @ beginning
    flips = rng.binomial(n, pseudo / (n + pseudo), size=resamples)
    counts = rng.multinomial(n - flips, np.full(n, 1 / n))
    heads = rng.binomial(flips[:, None], 0.5, size=(resamples, rows))
    size = episodes / n
    return np.asarray((counts @ outcomes.T + size * heads) / (counts @ each + size * flips)[:, None])


def _metric(metric: Metric, rates: np.ndarray, matrix: SuccessMatrix) -> np.ndarray:
    """`metric` of `rates` [..., rows, tasks], NaN where undefined."""
    value = metric(rates, len(matrix.trained))
    return np.full(rates.shape[:-2], np.nan) if value is None else value


def _value(metric: Metric, matrix: SuccessMatrix) -> float | None:
    """`metric` as measured, None where it is undefined or a cell is missing."""
    value = float(_metric(metric, matrix.rates(), matrix))
    return None if np.isnan(value) else value


def _episodes_behind(metric: Metric, matrix: SuccessMatrix) -> int:
    """Episodes in the cells that `metric` depends on; as metrics are linear, unit matrices tell which these are."""
    shape = matrix.rates().shape
    influence = _metric(metric, np.eye(shape[0] * shape[1]).reshape(-1, *shape), matrix)
    return int(matrix.episodes().reshape(-1)[influence != 0].sum())


def _estimate(value: float, resampled: np.ndarray, n: int) -> Estimate:
    """`value` with the percentile interval of its resamples."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high), n)
