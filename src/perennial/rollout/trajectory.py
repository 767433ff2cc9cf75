"""One episode: what was asked for, and what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from perennial.policies.base import Batch, Observation
from perennial.randomness import Key
from perennial.suites.base import Split


@dataclass(frozen=True)
class Episode:
    """A request to play one episode.

    Attributes:
        task, variant, split, initial_state: which world it starts in.
        instruction: what the policy is told.
        temperature: of sampling; 0 is greedy.
        key: names the random stream of the episode's action sampling.
        group: episodes with the same group number share one initial state and are compared with each other.
        keep: bring observations and samples back (training), or only the outcome (evaluation).
        film: side of the video frames to record in pixels, 0 for none.
    """

    task: str
    variant: str
    split: Split
    initial_state: int
    instruction: str
    temperature: float
    key: Key
    group: int = 0
    keep: bool = True
    film: int = 0


@dataclass(frozen=True)
class Trajectory:
    """A played episode with T decisions; arrays are empty where `episode.keep` is False.

    Attributes:
        images: uint8 [T, V, H, W, 3], one per decision.
        states: float32 [T, S].
        samples: [T, ...], log_probs: float32 [T, K], see `ActionChunk`.
        steps: int32 [T], environment steps executed of each chunk.
        success: the task was solved.
        frames: uint8 [F, H, W, 3] video frames.
    """

    episode: Episode
    images: np.ndarray
    states: np.ndarray
    samples: np.ndarray
    log_probs: np.ndarray
    steps: np.ndarray
    success: bool
    frames: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))

    @property
    def reward(self) -> float:
        """+1 at success, 0 otherwise."""
        return float(self.success)


def to_batch(trajectories: list[Trajectory], token_steps: np.ndarray) -> Batch:
    """All decisions of `trajectories` in order; tokens whose step was not executed any more are masked."""
    observation = Observation(
        np.concatenate([t.images for t in trajectories]),
        tuple(t.episode.instruction for t in trajectories for _ in range(len(t.steps))),
        np.concatenate([t.states for t in trajectories]),
    )
    steps = np.concatenate([t.steps for t in trajectories])
    return Batch(
        observation=observation,
        sample=np.concatenate([t.samples for t in trajectories]),
        mask=token_steps[None, :] < steps[:, None],
        temperature=trajectories[0].episode.temperature,
        log_prob=np.concatenate([t.log_probs for t in trajectories]),
    )
