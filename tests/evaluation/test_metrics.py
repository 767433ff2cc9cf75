import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from matrices import HAND_MADE

from perennial.evaluation.metrics import METRICS, avg, fwt, gain, nbt, zs, zs_gain


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (avg, (0.6 + 0.8 + 1.0) / 3),
        (gain, 0.8 - 0.2),
        (nbt, ((0.8 - 0.6) + (0.9 - 0.8)) / 2),
        (fwt, ((0.3 - 0.2) + (0.6 - 0.3)) / 2),
        (zs, 0.3),
        (zs_gain, 0.3 - 0.5),
    ],
)
def test_metrics_of_a_matrix_computed_by_hand(metric, expected):
    assert metric(np.array(HAND_MADE), 3) == pytest.approx(expected, abs=1e-12)
    batch = np.stack([np.array(HAND_MADE), np.zeros((4, 5))])
    np.testing.assert_allclose(metric(batch, 3), [expected, 0], atol=1e-12)


def test_what_is_not_defined_is_none():
    single = np.array([[0.2, 0.5], [0.9, 0.4]])
    assert nbt(single, 1) is None
    assert fwt(single, 1) is None
    assert gain(single, 1) == pytest.approx(0.7)
    no_held_out = np.array(HAND_MADE)[:, :3]
    assert zs(no_held_out, 3) is None
    assert zs_gain(no_held_out, 3) is None
    joint = np.array(HAND_MADE)[[0, 3]]
    assert nbt(joint, 3) is None
    assert fwt(joint, 3) is None
    assert gain(joint, 3) == pytest.approx(0.6)


def test_a_missing_cell_spoils_only_the_metrics_that_need_it():
    rates = np.array(HAND_MADE)
    rates[2, 1] = np.nan  # the diagonal cell of the second task
    undefined = {name for name, metric in METRICS.items() if np.isnan(metric(rates, 3))}
    assert undefined == {"nbt"}


def any_rates(rows=4, columns=5):
    return arrays.arrays(np.float64, (rows, columns), elements=st.floats(0, 1, width=32))


@given(any_rates())
def test_success_that_only_grows_is_never_forgetting(rates):
    grown = np.maximum.accumulate(rates, axis=0)
    assert nbt(grown, 3) <= 1e-12
    assert min(gain(grown, 3), fwt(grown, 3), zs_gain(grown, 3)) >= -1e-12


@given(any_rates(rows=1))
def test_a_policy_that_never_changes_gains_and_forgets_nothing(row):
    rates = np.repeat(row, 4, axis=0)
    assert [metric(rates, 3) for metric in (gain, nbt, fwt, zs_gain)] == [0, 0, 0, 0]


@given(any_rates())
def test_the_gain_is_what_was_learned_minus_what_was_forgotten(rates):
    learned = np.mean([rates[j, j - 1] - rates[0, j - 1] for j in (1, 2, 3)])
    assert gain(rates, 3) == pytest.approx(learned - nbt(rates, 3) * 2 / 3, abs=1e-9)
