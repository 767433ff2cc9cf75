"""How good was each trajectory compared with the others of its group, or each decision compared with its value?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perennial.rollout.trajectory import Trajectory

EPSILON = 1e-6
"""Added to the standard deviation, as in RLinf (`rlinf/algorithms/advantages.py`)."""


def group_relative(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Advantages of GRPO (arXiv 2402.03300), float32 [trajectories].

    (R - mean) / (std + 1e-6) within each group, with the unbiased standard deviation (divisor n - 1). A group whose
    returns are all equal has advantage exactly 0.
    """
    rewards = np.array([trajectory.reward for trajectory in trajectories], np.float64)
    groups = np.array([trajectory.episode.group for trajectory in trajectories])
    advantages = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = groups == group
        returns = rewards[members]
        if np.ptp(returns) > 0:
            advantages[members] = (returns - returns.mean()) / (returns.std(ddof=1) + EPSILON)
    return advantages.astype(np.float32)


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, trace: float) -> np.ndarray:
    """Generalised advantage estimates of one episode (arXiv 1506.02438, eq. 16), float64 [T].

    The sum of the discounted errors delta_t = r_t + gamma V_{t+1} - V_t, with weights (gamma * trace)^l. The episode
    ends for good after its last decision, where the value is 0.

    Args:
        rewards: [T], of each decision.
        values: [T], of the states before the decisions.
        gamma: discount from one decision to the next.
        trace: the lambda of the paper, in [0, 1]; 1 gives discounted return minus value, 0 the error delta_t.
    """
    advantages: np.ndarray = rewards + gamma * np.append(values[1:], 0.0) - values
    for step in reversed(range(len(advantages) - 1)):
        advantages[step] += gamma * trace * advantages[step + 1]
    return advantages
