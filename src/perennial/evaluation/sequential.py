"""Tests that may be looked at after every episode: betting against a hypothesis on the mean of paired differences.

A difference is 1 where the old policy solved an episode and the new one did not, -1 the other way round, else 0: their
mean is the drop in success. To somebody who believes that the drop is at least u, this bet is favourable or fair: a
share g of my stake becomes X / v, where X = (1 - difference) / 2 and v = (1 - u) / 2. If he is right, my stake grows to
1 / alpha with a chance of at most alpha, however often I look (Ville's inequality); if it does, he is shown to be
wrong. Betting is from Waudby-Smith & Ramdas 2024 (JRSS B 86). The share g need not be chosen, as the gains of all
shares can be averaged: Cover's universal portfolio (Cover 1991; Orabona & Jun 2024, IEEE Trans. Inf. Theory 70).

Differences need not have the same mean one by one. It suffices that they are independent given the past and come in
rounds whose averaged mean is at least u, for example one of every task: by the inequality of the arithmetic and the
geometric mean, the bets of a round then gain nothing on average either. Evidence is therefore valid after whole rounds.
"""

from __future__ import annotations

import math

import numpy as np

SHARES = (np.arange(64) + 0.5) / 64
"""The shares g over which the gains are averaged, uniform on (0, 1)."""
STEPS = 40
"""Bisections for an end of an interval; it is exact to 2 / 2^40."""


def log_evidence(differences: np.ndarray, drop: float) -> float:
    """Natural logarithm of the evidence that the mean of `differences` is below `drop`; 0 is no evidence.

    Args:
        differences: of -1, 0 and 1, any shape, whole rounds of them.
        drop: u, above -1 and below 1.
    """
    fell, same, rose = (np.count_nonzero(differences == value) for value in (1, 0, -1))
    logs = (
        fell * np.log1p(-SHARES)
        + same * np.log1p(SHARES * drop / (1 - drop))
        + rose * np.log1p(SHARES * (1 + drop) / (1 - drop))
    )
    return float(np.logaddexp.reduce(logs) - math.log(len(SHARES)))


def is_below(differences: np.ndarray, drop: float, error: float) -> bool:
    """Whether it is shown that the mean of `differences` is below `drop`; at most `error` is the chance to be wrong."""
    return log_evidence(differences, drop) >= -math.log(error)


def is_above(differences: np.ndarray, drop: float, error: float) -> bool:
    """Whether it is shown that the mean of `differences` is above `drop`; at most `error` is the chance to be wrong."""
    return is_below(-differences, -drop, error)


def interval(differences: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Where the mean of `differences` is, with this `confidence` at all times together: what is not shown to be wrong.

    Returns:
        Its low and high end in [-1, 1].
    """
    error = (1 - confidence) / 2
    return -_end(-differences, error), _end(differences, error)


def _end(differences: np.ndarray, error: float) -> float:
    """The smallest drop which the mean is shown to be below, by bisection, as evidence grows with the drop."""
    low, high = -1.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_below(differences, middle, error) else (middle, high)
    return high
