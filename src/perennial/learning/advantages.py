"""How good was each trajectory, compared with the others of its group?"""

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
