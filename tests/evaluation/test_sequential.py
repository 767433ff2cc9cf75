import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.evaluation.sequential import interval, is_above, is_below, log_evidence

DIFFERENCES = st.lists(st.sampled_from([-1, 0, 1]), max_size=60).map(np.array)


def wealth(differences, drop):
    """Stake by stake, share by share, in plain numbers."""
    total = 0.0
    for share in (np.arange(64) + 0.5) / 64:
        stake = 1.0
        for difference in differences:
            stake *= (1 - share) + share * ((1 - difference) / 2) / ((1 - drop) / 2)
        total += stake / 64
    return total


@given(DIFFERENCES, st.floats(-0.9, 0.9))
def test_evidence_is_what_the_bets_have_won(differences, drop):
    assert math.exp(log_evidence(differences, drop)) == pytest.approx(wealth(differences, drop), rel=1e-9)


def test_evidence_of_equal_outcomes_is_nearly_the_closed_form_of_a_uniform_share():
    """For n ties the integral over g of (1 + g q)^n is ((1 + q)^(n + 1) - 1) / (q (n + 1)), q = u / (1 - u)."""
    n, q = 150, 0.03 / 0.97
    expected = ((1 + q) ** (n + 1) - 1) / (q * (n + 1))
    assert math.exp(log_evidence(np.zeros(n), 0.03)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("probabilities", "drop"), [((0.2, 0.5, 0.3), 0.1), ((0.0, 0.97, 0.03), 0.03), ((0.5, 0.1, 0.4), -0.1)]
)
def test_no_bet_gains_on_average_where_the_belief_is_true(probabilities, drop):
    """All 3^5 sequences, weighed by their probability, at the edge of the hypothesis: the mean is exactly 1."""
    rose, _, fell = probabilities
    assert fell - rose == pytest.approx(drop)
    sequences = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5), -1).reshape(-1, 5)
    weights = np.array(probabilities)[sequences + 1].prod(1)
    mean = sum(w * math.exp(log_evidence(s, drop)) for w, s in zip(weights, sequences, strict=True))
    assert mean == pytest.approx(1)


def test_tasks_that_differ_gain_nothing_together_either():
    """One pair of each of two tasks a round: drops of 0.5 and -0.3 average 0.1, and no round gains."""
    of_tasks = np.array([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]])
    mean = 0.0
    for first in (-1, 0, 1):
        for second in (-1, 0, 1):
            chance = of_tasks[0, first + 1] * of_tasks[1, second + 1]
            mean += chance * math.exp(log_evidence(np.array([first, second]), 0.1))
    assert 0.9 < mean < 1


@given(DIFFERENCES, st.floats(0.01, 0.4))
def test_both_sides_mirror_each_other_and_grow_with_the_drop(differences, drop):
    assert is_above(differences, drop, 0.05) == is_below(-differences, -drop, 0.05)
    assert log_evidence(differences, drop) <= log_evidence(differences, drop + 0.1) + 1e-12


@given(DIFFERENCES)
def test_an_interval_holds_the_mean_and_ends_where_evidence_begins(differences):
    low, high = interval(differences)
    mean = differences.mean() if len(differences) else 0.0
    assert -1 <= low <= mean <= high <= 1
    for drop in (high + 1e-6, -(low - 1e-6)):
        if drop < 1:
            assert log_evidence(differences if drop > high else -differences, drop) >= math.log(1 / 0.025)
    if len(differences) == 0:
        assert (low, high) == (-1, 1)


def test_an_interval_covers_at_all_times_together():
    """Looked at after every fourth of 200 pairs, in 400 runs: at least 95 % of the runs never lose the mean."""
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(400):
        differences = rng.choice([-1, 0, 1], p=[0.1, 0.75, 0.15], size=200)
        looks = (differences[:n] for n in range(4, 201, 4))
        lost += any(is_below(look, 0.05, 0.025) or is_above(look, 0.05, 0.025) for look in looks)
    assert lost / 400 <= 0.05
