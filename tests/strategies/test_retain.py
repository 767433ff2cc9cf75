import pytest
import torch

from perennial.errors import PerennialError
from perennial.strategies.merge import Merge
from perennial.strategies.retain import Retain, shares
from strategies.worlds import TASKS, no_episodes, policy, shake, trajectory


def learn(strategy, learner, seed, task="left", collect=no_episodes):
    """Acting weights when learning begins, when it ends, and after merging."""
    strategy.before_task(TASKS[task], learner)
    before = learner.acting_weights()
    shake(learner, seed)
    learned = learner.acting_weights()
    strategy.after_task(TASKS[task], learner, collect)
    return before, learned, learner.acting_weights()


def assert_same(left, right, **tolerance):
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("adapter", [False, True])
def test_with_fixed_coefficients_it_is_merging_task_after_task(adapter):
    one, other = policy(adapter), policy(adapter)
    retain, merge = Retain(alpha=(0.3,), language=(0.9,)), Merge(alpha=0.3, language=0.9)
    for seed, task in enumerate(("left", "right")):
        assert_same(learn(retain, one, seed, task)[2], learn(merge, other, seed, task)[2])


def test_in_parallel_every_task_starts_from_the_base_and_the_mean_is_merged():
    learner, retain = policy(), Retain(alpha=(0.6,), chain="parallel")
    base = learner.acting_weights()
    endpoints = []
    for seed, task in enumerate(("left", "right", "up")):
        before, learned, merged = learn(retain, learner, seed, task)
        assert_same(before, base)
        endpoints.append(learned)
        mean = {name: sum(e[name] for e in endpoints) / len(endpoints) for name in base}
        assert_same(merged, {n: 0.4 * base[n] + 0.6 * mean[n] for n in base}, rtol=1e-5, atol=1e-6)


def playing(learner, base, learned, best):
    """Plays the policy as it is: the nearer its vision weights are to `best` of the way, the more often it succeeds."""
    calls = []

    def collect(count, task=None, variant="id", first=0):
        step = learned["vision.weight"] - base["vision.weight"]
        alpha = float(
            ((learner.acting_weights()["vision.weight"] - base["vision.weight"]) * step).sum() / step.pow(2).sum()
        )
        calls.append((round(alpha, 3), task, variant, first, count))
        rate = max(0.0, 1 - 2 * abs(alpha - best))
        return [trajectory(state % 10 < round(10 * rate), 1) for state in range(first, first + count)]

    return collect, calls


def searched(best, **settings):
    learner = policy()
    retain = Retain(**settings)
    retain.before_task(TASKS["left"], learner)
    base = learner.acting_weights()
    shake(learner, 1)
    learned = learner.acting_weights()
    collect, calls = playing(learner, base, learned, best)
    retain.after_task(TASKS["left"], learner, collect)
    return retain, calls, base, learned, learner.acting_weights()


def test_the_search_takes_the_alpha_that_succeeds_most_and_stops_hopeless_ones():
    retain, calls, base, learned, merged = searched(0.7, alpha=(0.1, 0.4, 0.7, 1.0), episodes=40)
    assert_same(merged, {n: 0.3 * base[n] + 0.7 * learned[n] for n in base}, rtol=1e-5, atol=1e-6)
    account = retain.account()
    assert account["alpha"] == {"vision": 0.7, "language": 0.7, "action": 0.7}
    tried = {row["alpha"]["vision"]: row for row in account["tried"]}
    assert tried[0.7] == {"alpha": account["alpha"], "successes": 40, "episodes": 40, "dropped": False}
    assert tried[0.1]["dropped"]
    assert tried[0.1]["episodes"] < 40
    assert {(task, variant) for _, task, variant, _, _ in calls} == {("left", "ood_val")}
    assert [call[3:] for call in calls if call[0] == 0.7] == [(start, 5) for start in range(0, 40, 5)]


def test_of_equals_the_smallest_alpha_is_taken():
    retain, *_ = searched(0.5, alpha=(0.8, 0.2), episodes=10)
    assert retain.account()["alpha"]["vision"] == 0.2


def test_groups_make_a_grid_and_common_values_stay_common():
    assert Retain(alpha=(0.5, 1.0)).candidates == [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)]
    grid = Retain(alpha=(1.0,), language=(0.2, 0.8)).candidates
    assert grid == [(1.0, 0.2, 1.0), (1.0, 0.8, 1.0)]
    assert Retain(vision=(0.1,), language=(0.2,), action=(0.3, 0.4), alpha=(0.5, 0.6)).candidates == [
        (0.1, 0.2, 0.3),
        (0.1, 0.2, 0.4),
    ]


def test_all_taught_tasks_are_judged_where_that_is_asked_for():
    learner = policy()
    retain = Retain(alpha=(0.0, 1.0), judged="taught", episodes=5)
    for task in ("left", "right"):
        played = []

        def collect(count, task=None, variant="id", first=0, played=played):
            played.append(task)
            return [trajectory(True, 1) for _ in range(count)]

        learn(retain, learner, 0, task, collect)
    assert played == ["left", "right", "left", "right"]
    assert retain.account()["tried"][0]["episodes"] == 10


@pytest.mark.parametrize("chain", ["running", "parallel"])
def test_the_shares_are_those_of_the_weights(chain):
    """Weights are linear in the base and the updates: the shares predict what is left of each."""
    coefficients = {"left": 0.3, "right": 0.6, "up": 0.5}
    found = shares({task: (a, a, a) for task, a in coefficients.items()}, chain)["language"]
    assert sum(found.values()) == pytest.approx(1)
    if chain == "running":
        assert found["base"] == pytest.approx(0.7 * 0.4 * 0.5)
        assert found["left"] == pytest.approx(0.3 * 0.4 * 0.5)
        assert found["up"] == pytest.approx(0.5)
    else:
        assert found == pytest.approx({"base": 0.5, "left": 0.5 / 3, "right": 0.5 / 3, "up": 0.5 / 3})


def test_dilution_with_a_common_alpha_is_a_power():
    chosen = {f"task{n}": (0.8, 0.8, 0.8) for n in range(10)}
    assert shares(chosen, "running")["action"]["base"] == pytest.approx(0.2**10)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"alpha": (1.2,)}, "between 0 and 1"),
        ({"language": (0.5, -0.1)}, "between 0 and 1"),
        ({"alpha": ()}, "has no alpha"),
        ({"episodes": 0}, "1 or more"),
    ],
)
def test_senseless_settings_are_refused(wrong, sentence):
    with pytest.raises(PerennialError, match=sentence):
        Retain(**wrong)


def test_only_a_search_plays_in_a_variant():
    assert Retain().variants() == frozenset()
    assert Retain(alpha=(0.5, 1.0), variant="ood_test").variants() == {"ood_test"}
