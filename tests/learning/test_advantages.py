import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perennial.learning.advantages import gae, group_relative
from perennial.rollout.trajectory import Episode, Trajectory


def trajectory(group: int, success: bool) -> Trajectory:
    episode = Episode("left", "id", "training", 0, "go left", 1.0, ("test",), group)
    empty = np.zeros(0, np.float32)
    return Trajectory(episode, empty, empty, empty, empty, np.array([2], np.int32), success)


def test_one_success_among_four_in_closed_form():
    # Returns 1, 0, 0, 0: mean 1/4, unbiased standard deviation 1/2.
    advantages = group_relative([trajectory(0, i == 0) for i in range(4)])
    np.testing.assert_allclose(advantages, np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6), rtol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=24))
def test_each_group_is_standardised_on_its_own(members):
    advantages = group_relative([trajectory(group, success) for group, success in members])
    for wanted in {group for group, _ in members}:
        mine = [i for i, (group, _) in enumerate(members) if group == wanted]
        returns = [float(members[i][1]) for i in mine]
        mean = sum(returns) / len(returns)
        if len(set(returns)) == 1:
            expected = [0.0] * len(returns)
        else:
            deviation = (sum((r - mean) ** 2 for r in returns) / (len(returns) - 1)) ** 0.5
            expected = [(r - mean) / (deviation + 1e-6) for r in returns]
        np.testing.assert_allclose(advantages[mine], expected, rtol=1e-5, atol=1e-7)
        if len(set(returns)) == 1:
            assert not advantages[mine].any()


episodes = st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12)
shares = st.floats(0, 1)


@given(episodes, shares, shares)
def test_gae_is_the_weighted_sum_of_the_errors_to_come(episode, gamma, trace):
    rewards, values = np.array(episode).T
    after = [*values[1:], 0.0]
    errors = [r + gamma * later - v for r, later, v in zip(rewards, after, values, strict=True)]
    expected = [
        sum((gamma * trace) ** ahead * error for ahead, error in enumerate(errors[t:])) for t in range(len(errors))
    ]
    np.testing.assert_allclose(gae(rewards, values, gamma, trace), expected, atol=1e-9)


@given(episodes, shares)
def test_with_trace_1_gae_is_the_discounted_return_minus_the_value(episode, gamma):
    rewards, values = np.array(episode).T
    returns = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    np.testing.assert_allclose(gae(rewards, values, gamma, 1.0), returns - values, atol=1e-9)


@given(episodes, shares)
def test_with_trace_0_gae_is_the_error_of_one_step(episode, gamma):
    rewards, values = np.array(episode).T
    estimates = gae(rewards, values, gamma, 0.0)
    np.testing.assert_allclose(estimates[:-1], rewards[:-1] + gamma * values[1:] - values[:-1], atol=1e-12)
    np.testing.assert_allclose(estimates[-1], rewards[-1] - values[-1], atol=1e-12)


def test_gae_leaves_its_arguments_alone():
    rewards, values = np.array([0.0, 1.0]), np.array([0.5, 0.25])
    np.testing.assert_allclose(gae(rewards, values, 0.5, 0.5), [-0.1875, 0.75])
    assert (rewards.tolist(), values.tolist()) == ([0.0, 1.0], [0.5, 0.25])
