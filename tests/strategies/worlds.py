"""What the tests of single strategies share."""

import numpy as np
import torch

from perennial.policies.base import Batch, Observation
from perennial.policies.lora import LoRA, add_adapter
from perennial.randomness import stream
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.testing.toy import ToyPolicy, ToySuite

TASKS = ToySuite.tasks


def batch(rows, seed=0, instruction="go left", mask=None):
    rng = stream(seed, "batch")
    images = rng.integers(0, 256, (rows, 1, 8, 8, 3)).astype(np.uint8)
    states = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    sample = rng.integers(0, 9, (rows, 4))
    if mask is None:
        mask = np.ones((rows, 4), bool)
        mask[::2, 2:] = False
    return Batch(Observation(images, (instruction,) * rows, states), sample, mask)


def trajectory(success, decisions, seed=0, instruction="go left"):
    rows = batch(decisions, seed, instruction)
    steps = np.where(rows.mask.all(1), 2, 1).astype(np.int32)
    episode = Episode("left", "id", "training", 0, instruction, 1.5, ("test", seed))
    log_probs = np.zeros((decisions, 4), np.float32)
    seen = rows.observation
    return Trajectory(episode, seen.images, seen.states, rows.sample, log_probs, steps, success)


def policy(adapter=False, seed=1):
    made = ToyPolicy(seed)
    if adapter:
        add_adapter(made, LoRA(rank=3, alpha=6), seed=0)
    return made


@torch.no_grad()
def shake(learner, seed, size=0.1):
    """Stands for learning: every trainable parameter moves at random."""
    for name, parameter in learner.trainable().items():
        parameter.add_(torch.from_numpy(stream(seed, "shake", name).normal(0, size, tuple(parameter.shape))))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def no_episodes(*_):
    raise AssertionError("nothing is to be played")
