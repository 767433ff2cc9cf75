from dataclasses import replace

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from matrices import HAND_MADE, matrix_of_rates, simulated
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from perennial.errors import PerennialError
from perennial.evaluation import statistics
from perennial.evaluation.metrics import METRICS
from perennial.evaluation.statistics import (
    difference,
    difference_of_groups,
    mean_difference,
    summary,
    summary_of_groups,
    summary_of_runs,
    wilson,
)
from perennial.evaluation.success_matrix import SuccessMatrix


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_as_published(successes, episodes, low, high):
    estimate = wilson(successes, episodes)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (estimate.value, estimate.n) == (successes / episodes, episodes)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_intervals_are_those_of_scipy(episodes, share):
    successes = round(share * episodes)
    expected = binomtest(successes, episodes).proportion_ci(method="wilson")
    found = wilson(successes, episodes)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-12), pytest.approx(expected.high, abs=1e-12))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_episodes_from_few_states_tell_no_more_than_the_states():
    few, many = wilson(25, 50), wilson(160, 320, states=50)
    assert (many.low, many.high, many.n) == (few.low, few.high, 320)
    assert wilson(20, 40, states=50) == wilson(20, 40)


def repeated(matrix, times, states):
    """The same matrix, as if its states were `states` played one after another, and then all again."""
    rows = tuple({task: np.tile(row[task], times) for task in row} for row in matrix.successes)
    return replace(matrix, successes=rows, states=dict.fromkeys(matrix.tasks, states))


def test_copies_of_episodes_change_no_interval():
    matrix = simulated(HAND_MADE, 3, 50, np.random.default_rng(2))
    once, copied = summary(matrix), summary(repeated(matrix, 6, 50))
    for name, estimate in once.items():
        assert copied[name] == replace(estimate, n=6 * estimate.n)
    naive = summary(replace(repeated(matrix, 6, 50), states={}))
    assert naive["avg"].high - naive["avg"].low < 0.5 * (once["avg"].high - once["avg"].low)
    assert (
        mean_difference([(repeated(matrix, 6, 50),) * 2] * 2)["avg"].high
        == mean_difference([(matrix,) * 2] * 2)["avg"].high
    )


def test_states_are_resampled_with_all_their_episodes():
    """Seven episodes in three states: the first state has three, which succeed, the others two each, which fail."""
    outcomes = np.array([[1.0, 0, 0, 1, 0, 0, 1]])
    found = statistics._resample(outcomes, 400, 0.0, np.random.default_rng(0), states=3)
    assert {round(rate, 9) for rate in found.ravel()} == {round(3 * k / (3 * k + 2 * (3 - k)), 9) for k in range(4)}
    assert set(statistics._resample(outcomes, 400, 0.0, np.random.default_rng(0), states=9).ravel() * 7) <= set(
        range(8)
    )


def test_episodes_that_only_share_a_state_by_name_are_as_good_as_others():
    rng = np.random.default_rng(3)
    matrix = SuccessMatrix(("a",), (), ({"a": rng.random(1000) < 0.5},), {"a": 50})
    found = summary(matrix)["avg"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.25 / 1000) ** 0.5, rel=0.3)


def test_values_and_episodes_of_a_matrix_computed_by_hand():
    found = summary(matrix_of_rates(HAND_MADE, trained=3, episodes=10))
    expected = {
        "avg": (0.8, 3 * 10),
        "gain": (0.6, 6 * 10),
        "nbt": (0.15, 4 * 10),
        "fwt": (0.2, 4 * 10),
        "zs": (0.3, 2 * 10),
        "zs_gain": (-0.2, 4 * 10),
    }
    assert {name: (pytest.approx(e.value), e.n) for name, e in found.items()} == expected
    assert all(e.low < e.value < e.high for e in found.values())


def test_undefined_metrics_and_unfinished_runs_are_none_not_zero():
    single = summary(matrix_of_rates([[0.2], [0.9]], trained=1))
    assert {name for name, estimate in single.items() if estimate is None} == {"nbt", "fwt", "zs", "zs_gain"}
    rates = np.array(HAND_MADE)
    rates[3] = np.nan
    unfinished = summary(matrix_of_rates(rates.tolist(), trained=3))
    assert {name for name, estimate in unfinished.items() if estimate is not None} == {"fwt"}
    nothing = SuccessMatrix(("a", "b"), ("c",), ({}, {}, {}))
    assert set(summary(nothing).values()) == {None}


def test_a_policy_that_never_changes_gains_and_forgets_nothing():
    found = summary(matrix_of_rates([HAND_MADE[0]] * 4, trained=3))
    for name in ("gain", "nbt", "fwt", "zs_gain"):
        assert found[name].value == 0
        assert found[name].low < 0 < found[name].high


def test_the_interval_of_one_rate_is_as_wide_as_theory_says():
    found = summary(matrix_of_rates([[0.3], [0.6]], trained=1, episodes=200))["avg"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.6 * 0.4 / 200) ** 0.5, rel=0.08)


def test_rows_share_their_resampled_states():
    # States solved by the base stay solved, so the gain of 0.3 varies as a single rate does.
    found = summary(matrix_of_rates([[0.3], [0.6]], trained=1, episodes=200))["gain"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 200) ** 0.5, rel=0.08)


def test_certainty_is_never_claimed():
    perfect = summary(matrix_of_rates([[0.0] * 4] + [[1.0] * 4] * 3, trained=3, episodes=40))
    assert perfect["avg"].high == 1
    assert 0.93 < perfect["avg"].low < 0.99
    assert 0.02 < perfect["nbt"].high < 0.07
    assert perfect["nbt"].low < 0


@given(
    arrays.arrays(np.bool_, st.tuples(st.sampled_from([3]), st.sampled_from([3]), st.integers(1, 6))),
    st.integers(1, 4),
)
@settings(max_examples=60)
def test_an_interval_contains_its_value(outcomes, runs):
    rows = tuple({f"task{column}": row[column] for column in range(3)} for row in outcomes)
    found = summary_of_runs([SuccessMatrix(("task0", "task1"), ("task2",), rows)] * runs)
    assert all(e.low - 1e-12 <= e.value <= e.high + 1e-12 for e in found.values())


def test_an_estimate_is_the_same_every_time():
    matrix = simulated(HAND_MADE, 3, 20, np.random.default_rng(0))
    assert summary(matrix) == summary(matrix)


@pytest.mark.parametrize("levels", [(0.3, 0.6), (0.9, 0.99)])
def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch, levels):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    rng = np.random.default_rng(1)
    truth = np.linspace(*levels, 4)[:, None] * np.ones(5)
    hits = dict.fromkeys(METRICS, 0)
    for _ in range(200):
        for name, estimate in summary(simulated(truth, 3, 40, rng)).items():
            hits[name] += estimate.low - 1e-12 <= METRICS[name](truth, 3) <= estimate.high + 1e-12
    assert all(count >= 180 for count in hits.values()), hits
    assert min(hits.values()) <= 198, "intervals that always hold the truth are too wide"


def test_runs_are_averaged_and_counted():
    runs = [matrix_of_rates([[0.1, 0.1], [level, 0.1], [level, level]], trained=2) for level in (0.2, 0.5, 0.8)]
    found = summary_of_runs(runs)
    assert (found["avg"].value, found["avg"].n) == (pytest.approx(0.5), 3)
    assert (found["avg"].low, found["avg"].high) == (0, 1), "three runs that differ so much say nothing, within limits"
    assert found["zs"] is None


def final(rates, trained=1):
    """A run of which only the last row is known; each rate is of 200 states."""
    return matrix_of_rates([rates], trained, episodes=200)


def test_runs_that_differ_a_lot_have_the_t_interval_of_their_values():
    runs, other = (0.35, 0.5, 0.62), (0.4, 0.7, 0.9)
    found = summary_of_runs([final([rate]) for rate in runs])["avg"]
    expected = ttest_1samp(runs, 0).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    found = mean_difference([(final([a]), final([b])) for a, b in zip(runs, other, strict=True)])["avg"]
    expected = ttest_rel(other, runs).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_groups_pool_the_variance_between_their_runs():
    values = ((0.2, 0.5), (0.4, 0.6, 0.8), (0.3,))
    groups = [[final([rate]) for rate in group] for group in values]
    squares = 2 * 0.15**2 + 2 * 0.2**2  # around their means, with 1 + 2 degrees of freedom
    margin = 3.182446 * (squares / 3 * (1 / 2 + 1 / 3 + 1)) ** 0.5 / 3
    found = summary_of_groups(groups)["avg"]
    mean = (0.35 + 0.6 + 0.3) / 3
    assert (found.low, found.high) == (pytest.approx(mean - margin), pytest.approx(mean + margin))
    against = difference_of_groups([[(final([0.0]), run) for run in group] for group in groups])["avg"]
    assert (against.low, against.high) == (pytest.approx(mean - margin), pytest.approx(mean + margin))


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.03, 0.12])
def test_intervals_over_seeds_hold_the_truth(monkeypatch, runs, spread):
    """500 studies of two methods alike, whose seeds spread around 0.5; the luck of 100 states is half shared by all."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng, studies = np.random.default_rng([runs, round(100 * spread)]), 500
    rates, luck = rng.normal(0.5, spread, (studies, 2, runs, 1)), rng.random((studies, 1, 1, 100))
    own = rng.random((studies, 2, runs, 100))
    outcomes = np.where(rng.random(own.shape) < 0.5, luck, own) < rates
    resampled = statistics._resample(outcomes.reshape(-1, 100).astype(float), 200, 2.0, rng).T
    values, spreads = outcomes.mean(-1), resampled.reshape(studies, 2, runs, 200)
    held = null = 0
    for (first, second), (drawn, other) in zip(values, spreads, strict=True):
        found = statistics._mean([list(zip(first, drawn, strict=True))], (0, 1))
        held += found.low <= 0.5 <= found.high
        found = statistics._mean([list(zip(second - first, other - drawn, strict=True))], (-1, 1))
        null += found.low <= 0 <= found.high
    assert min(held, null) >= 0.93 * studies
    assert held < studies or runs == 2, "intervals that always hold the truth are too wide"


def test_runs_that_agree_still_carry_the_uncertainty_of_the_states_that_they_share():
    rates = [[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]]
    matrix = matrix_of_rates(rates, trained=2, episodes=200)
    one, four = summary(matrix)["avg"], summary_of_runs([matrix] * 4)["avg"]
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.1)


def test_an_unfinished_run_among_several_leaves_the_metric_undefined():
    done = matrix_of_rates([[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]], trained=2)
    under_way = matrix_of_rates([[0.1, 0.1], [0.5, 0.1], [np.nan, np.nan]], trained=2)
    assert summary_of_runs([done, under_way])["avg"] is None


def test_runs_of_different_tasks_are_not_averaged():
    first, second = matrix_of_rates([[0.1], [0.2]], trained=1), matrix_of_rates([[0.1, 0.1], [0.2, 0.2]], trained=1)
    with pytest.raises(PerennialError, match="different tasks"):
        summary_of_runs([first, second])
    with pytest.raises(PerennialError, match="no run"):
        summary_of_runs([])


def test_the_difference_of_a_run_to_itself_is_zero_and_sharp():
    matrix = simulated(HAND_MADE, 3, 40, np.random.default_rng(0))
    alone = summary(matrix)
    for name, estimate in difference(matrix, matrix).items():
        assert estimate.value == 0
        assert estimate.low <= 0 <= estimate.high
        assert estimate.high - estimate.low < 0.6 * (alone[name].high - alone[name].low)
        assert estimate.n == 2 * alone[name].n


def test_differences_are_second_minus_first_on_common_tasks_and_states():
    first = matrix_of_rates([[0.1, 0.1, 0.5]] + [[0.6, 0.6, 0.5]] * 2, trained=2, episodes=20)
    # The other order of tasks, and half as many states, of which all are solved at last.
    order = ("task1", "task0")
    rows = tuple({task: np.arange(10) < (10 if row else 2) for task in order} for row in range(3))
    found = difference(first, SuccessMatrix(order, (), rows))
    # On its first 10 states, `first` has rates 0.2 before and 1.0 after.
    assert {name: e and pytest.approx(e.value) for name, e in found.items()} == {
        "avg": 0.0,
        "gain": 0.0,
        "nbt": 0.0,
        "fwt": 0.0,
        "zs": None,
        "zs_gain": None,
    }
    assert difference(SuccessMatrix(order, (), rows), first)["avg"].n == 2 * 2 * 10
    worse = difference(first, SuccessMatrix(order, (), (rows[0], rows[0], rows[0])))
    assert worse["avg"].value == pytest.approx(-0.8)
    assert worse["avg"].high < -0.4
    assert worse["avg"].n == 2 * 2 * 10


def test_forgetting_is_compared_between_two_orders_of_the_same_tasks():
    # Each run forgets what it learned first, and keeps what it learned last.
    first = matrix_of_rates([[0.0, 0.0], [0.9, 0.0], [0.1, 0.9]], trained=2, episodes=40)
    rows = tuple({"task0": row["task1"], "task1": row["task0"]} for row in first.successes)
    found = difference(first, SuccessMatrix(("task1", "task0"), (), rows))["nbt"]
    assert found.value == 0
    assert -0.35 < found.low < 0 < found.high < 0.35


def test_joint_training_is_compared_where_it_can_be():
    sequential = matrix_of_rates([[0.1, 0.1, 0.5], [0.6, 0.1, 0.5], [0.6, 0.6, 0.5]], trained=2)
    joint = matrix_of_rates([[0.1, 0.1, 0.5], [0.9, 0.7, 0.3]], trained=2)
    found = difference(sequential, joint)
    assert {name: e and pytest.approx(e.value) for name, e in found.items()} == {
        "avg": 0.2,
        "gain": 0.2,
        "nbt": None,
        "fwt": None,
        "zs": -0.2,
        "zs_gain": -0.2,
    }


def test_some_common_tasks_give_no_forgetting_but_an_average():
    three = matrix_of_rates([[0.1] * 3, [0.6] * 3, [0.6] * 3, [0.6] * 3], trained=3)
    two = matrix_of_rates([[0.1] * 2, [0.6] * 2, [0.9] * 2], trained=2)
    found = difference(three, two)
    assert found["avg"].value == pytest.approx(0.3)
    assert found["nbt"] is None


def test_runs_without_a_common_task_have_no_difference():
    other = SuccessMatrix(("x",), (), ({"x": np.ones(3, bool)}, {"x": np.ones(3, bool)}))
    with pytest.raises(PerennialError, match="no task in common: one teaches task0, the other x"):
        difference(matrix_of_rates([[0.1], [0.2]], trained=1), other)


def test_a_mean_difference_is_the_mean_of_the_differences_and_knows_that_states_are_shared():
    rng = np.random.default_rng(5)

    def run(rate):
        rows = [{task: rng.random(60) < rate for task in ("a", "b")} for _ in range(3)]
        return SuccessMatrix(("a", "b"), (), tuple(rows))

    pairs = [(run(0.3), run(0.6)) for _ in range(4)]
    found = mean_difference(pairs)
    values = [difference(*pair)["avg"].value for pair in pairs]
    assert found["avg"].value == pytest.approx(np.mean(values))
    assert found["avg"].n == 4
    assert found["avg"].low < np.mean(values) < found["avg"].high
    same = mean_difference([(first, first) for first, _ in pairs])
    width = same["avg"].high - same["avg"].low
    assert width < 0.5 * (found["avg"].high - found["avg"].low)
    assert mean_difference(pairs[:1]) == difference(*pairs[0])
    with pytest.raises(PerennialError, match="no pair"):
        mean_difference([])


def test_groups_of_runs_count_alike_and_are_not_resampled():
    low = [matrix_of_rates([[0.1], [rate]], trained=1, episodes=200) for rate in (0.2, 0.2, 0.2, 0.2)]
    high = [matrix_of_rates([[0.1], [0.8]], trained=1, episodes=200)]
    found = summary_of_groups([low, high])["avg"]
    assert (found.value, found.n) == (pytest.approx(0.5), 5)
    assert found.high - found.low < 0.15, "were groups resampled, the mean would reach from 0.2 to 0.8"
    assert summary_of_groups([low]) == summary_of_runs(low)
    for groups in ([], [low, []]):
        with pytest.raises(PerennialError, match="no run"):
            summary_of_groups(groups)


def test_the_difference_of_groups_is_the_mean_of_their_mean_differences():
    first, second = (
        [matrix_of_rates([[0.1], [rate]], trained=1, episodes=50) for rate in rates]
        for rates in ((0.2, 0.4), (0.5, 0.9))
    )
    groups = [[(first[0], second[0]), (first[1], second[1])], [(second[0], first[0])]]
    found = difference_of_groups(groups)["avg"]
    assert (found.value, found.n) == (pytest.approx((0.4 - 0.3) / 2), 3)
    assert difference_of_groups(groups[:1]) == mean_difference(groups[0])
    with pytest.raises(PerennialError, match="no pair"):
        difference_of_groups([[]])
