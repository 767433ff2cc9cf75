import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perennial.learning.advantages import group_relative
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
