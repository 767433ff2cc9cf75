from dataclasses import replace

import numpy as np
import pytest

from perennial.policies.base import Batch
from perennial.rollout.collect import Environments, play
from perennial.rollout.trajectory import Episode, Trajectory, to_batch
from perennial.testing.toy import ToyPolicy, ToySuite


class Precise(ToyPolicy):
    """The toy policy in float64, so that gradients can be compared tightly."""

    def __init__(self, seed: int = 0, hidden: int = 32) -> None:
        super().__init__(seed, hidden)
        self.model.double().register_forward_pre_hook(lambda _, inputs: tuple(each.double() for each in inputs))


@pytest.fixture(scope="session")
def played() -> list[Trajectory]:
    """Six groups of four short episodes, of which two groups end alike."""
    suite = ToySuite()
    episodes = [
        Episode("left", "id", "training", group, "go left", 1.0, ("learning", group, member), group)
        for group in range(6)
        for member in range(4)
    ]
    trajectories = play(ToyPolicy(), Environments(suite, 8), episodes, seed=3, slots=24)
    fates = {0: (0, 0, 0, 0), 1: (1, 1, 1, 1), 2: (1, 0, 0, 1), 3: (0, 1, 0, 0), 4: (1, 1, 0, 1), 5: (0, 0, 1, 0)}
    # Lengths in environment steps; odd ones leave the second half of the last chunk unexecuted.
    lengths = np.random.default_rng(0).integers(1, 11, len(episodes))
    return [
        cut(t, int(length), bool(fates[t.episode.group][i % 4]))
        for i, (t, length) in enumerate(zip(trajectories, lengths, strict=True))
    ]


def cut(trajectory: Trajectory, length: int, success: bool) -> Trajectory:
    """The trajectory as if it had ended after at most `length` environment steps."""
    length = min(length, int(trajectory.steps.sum()))
    decisions = -(-length // 2)
    steps = np.full(decisions, 2, np.int32)
    steps[-1] = length - 2 * (decisions - 1)
    kept = {name: getattr(trajectory, name)[:decisions] for name in ("images", "states", "samples", "log_probs")}
    return replace(trajectory, steps=steps, success=success, **kept)


@pytest.fixture(scope="session")
def toy_batch(played: list[Trajectory]) -> Batch:
    return to_batch(played, ToyPolicy.token_steps)


@pytest.fixture
def precise() -> Precise:
    return Precise()
