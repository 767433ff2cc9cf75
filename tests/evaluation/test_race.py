import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.evaluation.race import Runner, race, winner
from perennial.randomness import stream


def player(rates, seed=0, tasks=1, log=None):
    """Plays independent episodes of policies that succeed with these rates."""
    table = {n: stream(seed, "player", n).random((400, tasks)) < rate for n, rate in enumerate(rates)}

    def play(number, rounds):
        if log is not None:
            log.append((number, rounds))
        return table[number][rounds.start : rounds.stop]

    return play


def test_hopeless_policies_leave_early_and_nobody_else():
    field = race(3, player([0.0, 1.0, 1.0]), rounds=100)
    assert [runner.dropped for runner in field] == [True, False, False]
    assert len(field[0].outcomes) <= 20
    assert [len(runner.outcomes) for runner in field[1:]] == [100, 100]
    assert field[0].rate == 0
    assert field[1].rate == 1


def test_all_play_the_same_rounds_in_order_until_they_leave():
    log = []
    race(3, player([0.0, 0.9, 0.9], log=log), rounds=12, step=5)
    by_runner = {n: [list(rounds) for number, rounds in log if number == n] for n in range(3)}
    assert by_runner[1] == by_runner[2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert by_runner[0] == by_runner[1][: len(by_runner[0])]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_somebody_always_finishes_and_wins(rates, seed):
    field = race(len(rates), player(rates, seed, tasks=2), rounds=30)
    best = field[winner(field)]
    assert not best.dropped
    assert best.outcomes.shape == (30, 2)
    assert all(best.rate >= runner.rate for runner in field if not runner.dropped)


def test_the_best_seldom_leaves():
    """The chance is 5 % at most: 10 of 200 races."""
    left = sum(race(4, player([0.6, 0.5, 0.5, 0.5], seed), rounds=100)[0].dropped for seed in range(200))
    assert left <= 10


def test_a_clear_case_needs_few_episodes():
    played = sum(r.outcomes.size for r in race(6, player([0, 0.05, 0.1, 0.8, 0.85, 0.2]), rounds=100))
    assert played < 400


@pytest.mark.parametrize(
    ("rates", "expected"), [([1, 0.5, 0.5], 1), ([0.2, 0.4, 0.3], 1), ([0.4, 0.4, 0.4], 0), ([1, 0.2, 0.6], 2)]
)
def test_the_winner_ran_to_the_end_and_is_the_first_of_equals(rates, expected):
    field = [Runner(np.arange(10) < 10 * rate, dropped=rate == 1) for rate in rates]
    assert winner(field) == expected


def test_what_is_best_in_one_objective_stays_and_what_is_dominated_leaves():
    """Success by objective: 0 and 1 are both on the front, 2 is beaten by 1 in the first and equal in the second."""
    rates = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

    def play(number, rounds):
        return np.tile(rates[number] == 1, (len(rounds), 1))

    field = race(3, play, rounds=60, objectives=(slice(0, 1), slice(1, 2)))
    assert [runner.dropped for runner in field] == [False, False, True]
    assert winner(field, lambda runner: float(runner.outcomes[:, 1].mean())) == 0
    assert winner(field, lambda runner: float(runner.outcomes[:, 0].mean())) == 1
