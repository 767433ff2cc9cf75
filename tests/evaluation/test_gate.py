"""The gate on policies whose outcomes are drawn from known probabilities."""

from dataclasses import replace
from functools import cache
from math import log

import numpy as np
import pytest

from perennial.evaluation.gate import BLOCK, Gate, decide, judge
from perennial.evaluation.sequential import log_evidence
from perennial.testing.toy import ToySuite
from toyhouse.finite import FiniteSuite

GATE = Gate(max_forgetting=10)


def policies(old, new, seed=0, same=0.0):
    """Successes by chance; `old` and `new` are rates by task, at scales in between in proportion.

    With probability `same` an episode ends alike whatever the weights.
    """
    old, new = np.atleast_1d(old), np.atleast_1d(new)
    asked = []

    @cache
    def luck(number):
        rng = np.random.default_rng([seed, number])
        return rng.random(len(old)) < same, rng.random(len(old)), rng.random((5, len(old)))

    def play(scale, rounds):
        asked.append((scale, rounds))
        rates = old + scale * (new - old)
        found = []
        for number in rounds:
            alike, shared, own = luck(number)
            found.append(np.where(alike, shared < old, own[round(4 * scale)] < rates))
        return np.array(found)

    return play, asked


def test_weights_that_act_alike_pass_as_soon_as_the_margin_allows():
    def play(scale, rounds):
        return np.ones((len(rounds), 2), bool)

    (trial,) = judge(GATE, 2, play)
    assert (trial.scale, trial.passed, trial.shown, trial.drop, trial.drops) == (1, True, True, 0, (0, 0))
    assert trial.pairs <= 64
    assert trial.low < 0 < trial.high
    (trial,) = judge(Gate(max_forgetting=3), 2, play)
    assert (trial.passed, trial.shown) == (True, True)
    assert trial.pairs == 192


def test_a_collapse_is_seen_in_the_first_block_or_two():
    play, asked = policies([0.9, 0.8], [0.1, 0.0])
    trials = judge(GATE, 2, play)
    assert (trials[0].passed, trials[0].shown) == (False, True)
    assert trials[0].pairs <= 2 * BLOCK
    assert trials[0].low > 0.1
    # Each old episode is played once, although four scales were tried.
    old = [number for scale, rounds in asked if scale == 0 for number in rounds]
    assert old == list(range(len(old)))


def test_the_largest_scale_that_passes_is_taken():
    def play(scale, rounds):
        return np.full((len(rounds), 3), scale <= 0.5)

    trials = judge(Gate(max_forgetting=5, scales=(0.25, 0.5, 0.75)), 3, play)
    assert [(t.scale, t.passed) for t in trials] == [(1, False), (0.75, False), (0.5, True)]


def test_nothing_passes_where_the_smallest_scale_destroys():
    trials = judge(GATE, 1, lambda scale, rounds: np.full((len(rounds), 1), scale == 0))
    assert [(t.scale, t.passed) for t in trials] == [(1, False), (0.75, False), (0.5, False), (0.25, False)]


def test_one_task_may_not_collapse_behind_a_mean_that_holds():
    """Ten tasks, one of them lost: a drop of 9.5 points on average, of 95 on one."""
    old, new = np.full(10, 0.95), np.full(10, 0.95)
    new[3] = 0.0
    play, _ = policies(old, new, same=1.0)

    def lost(scale, rounds):
        found = play(scale, rounds)
        found[:, 3] &= scale == 0
        return found

    (trial,) = judge(Gate(max_forgetting=15, scales=()), 10, lost)
    assert (trial.passed, trial.shown) == (False, True)
    assert trial.drops[3] > 0.9
    assert trial.drop < 0.15


def test_at_the_cap_the_measured_drops_decide():
    gate = Gate(max_forgetting=10, max_task_forgetting=20)
    same = np.zeros((30, 2), int)
    for fell, passes in ((2, True), (3, True), (4, True)):
        differences = same.copy()
        differences[:fell, 0] = 1
        assert decide(gate, differences, 0.05, last=True)[0] == passes
    differences = same.copy()
    differences[:7, 0], differences[:2, 1] = 1, -1  # 5 of 60 are below 10 points, but 7 of 30 above 20
    assert decide(gate, differences, 0.05, last=True) == (False, False)
    assert decide(gate, differences, 0.05, last=False) is None
    differences[6, 0], differences[:2, 1] = 0, 0  # 6 of 60 and 6 of 30 are exactly at both margins
    assert decide(gate, differences, 0.05, last=True) == (True, False)


def test_where_states_are_finite_each_is_played_once():
    gate = Gate(max_forgetting=10, pairs=400)
    assert gate.limited(ToySuite(), ["left", "right"]) == gate
    assert gate.limited(FiniteSuite(), ["left", "right", "up"]) == replace(gate, pairs=3 * 4)
    assert replace(gate, pairs=5).limited(FiniteSuite(), ["left", "right"]).pairs == 5


def test_what_can_be_shown_is_what_equal_outcomes_show():
    for pairs in (150, 170, 190, 192):
        gate = Gate(max_forgetting=3, pairs=pairs)
        (trial, *_) = judge(gate, 2, lambda scale, rounds: np.ones((len(rounds), 2), bool))
        assert gate.can_show() == trial.shown


def errors(drop, runs, gate, same):
    """Shares of runs that were shown to be safe, shown to fall, and carried on; and the mean number of pairs."""
    change = drop / (1 - same)
    play_of = (policies([0.7, 0.5], [0.7 - change, 0.5 - change], seed, same)[0] for seed in range(runs))
    trials = [judge(gate, 2, play)[0] for play in play_of]
    shown = [(t.passed, t.shown) for t in trials]
    carried_on = sum(t.passed for t in trials)
    pairs = np.mean([t.pairs for t in trials])
    return shown.count((True, True)) / runs, shown.count((False, True)) / runs, carried_on / runs, pairs


def test_the_error_rates_are_kept():
    """150 runs at the margin: neither conclusion may be shown more often than promised, however often one looks."""
    gate = Gate(max_forgetting=10, scales=(), pairs=300)
    safe, fell, _, _ = errors(0.1, 150, gate, same=0.5)
    assert safe <= gate.alpha / 2
    assert fell <= gate.beta


def test_clear_cases_end_early_and_well():
    gate = Gate(max_forgetting=10, scales=())
    safe, _, carried_on, pairs = errors(0.0, 60, gate, same=0.9)
    assert safe > 0.9
    assert carried_on == 1
    assert pairs < 130
    _, fell, carried_on, pairs = errors(0.45, 60, gate, same=0.0)
    assert fell == 1
    assert carried_on == 0
    assert pairs < 70


@pytest.mark.parametrize(("number", "scale"), [(1, 1.0), (2, 0.75), (3, 0.5), (4, 0.25)])
def test_every_scale_spends_half_the_alpha_of_the_one_before(number, scale):
    """Weights that act alike need more pairs the later they are tried, so that all scales together stay below alpha."""
    gate = Gate(max_forgetting=3, pairs=1000)
    trial = judge(gate, 1, lambda tried, rounds: np.full((len(rounds), 1), tried <= scale))[-1]
    assert (trial.scale, trial.passed, trial.shown) == (scale, True, True)
    needed = log(2**number / gate.alpha)
    assert log_evidence(np.zeros(trial.pairs - BLOCK), 0.03) < needed <= log_evidence(np.zeros(trial.pairs), 0.03)


@pytest.mark.parametrize("tasks", [2, 12])
def test_single_tasks_share_half_of_beta(tasks):
    """One task falls just often enough to be shown, while others gain, so that the mean stays far from its margin."""
    gate = Gate(max_forgetting=19, max_task_forgetting=20)

    def fallen(times):
        differences = np.full((60, tasks), -1)
        differences[:, 0] = np.arange(60) < times
        return differences

    needed = log(2 * tasks / gate.beta)
    enough = next(times for times in range(61) if log_evidence(-fallen(times)[:, 0], -0.2) >= needed)
    assert decide(gate, fallen(enough), 1e-9, last=False) == (False, True)
    assert decide(gate, fallen(enough - 1), 1e-9, last=False) is None


def test_many_tasks_at_their_margin_are_not_shown_to_fall_more_often_than_promised():
    """Sixteen tasks fall by just the 20 points that they may, in 100 runs with thirty looks each."""
    gate = Gate(max_forgetting=20, max_task_forgetting=20)
    falls = (np.random.default_rng(seed).random((60, 16)) < 0.2 for seed in range(100))
    looks = ([decide(gate, fall[:n].astype(int), 1e-9, last=False) for n in range(2, 61, 2)] for fall in falls)
    assert sum((False, True) in verdicts for verdicts in looks) <= 100 * gate.beta
