"""Flow-SDE: a flow that is integrated with noise, so that its samples have log-probabilities; noise to learn it from.

A flow model moves noise x_1 ~ N(0, 1) along x_t = t noise + (1 - t) action to an action at t = 0 by the velocity
v(x, t) = E[noise - action | x_t = x]. The Euler step over d = 1 / steps is x - v d. Flow-SDE (pi_RL, arXiv 2510.25889;
Flow-GRPO, arXiv 2505.05470) replaces a step by the Gaussian transition

    N(x - [v + sigma^2 / (2 t) (x + (1 - t) v)] d, sigma^2 d),    sigma = a sqrt(t / (1 - t)),

which has the same marginals as d -> 0, whatever the noise level a: x + (1 - t) v is the expected noise, and minus that
over t is the score of x_t. In sigma at t = 1 the divisor is that of the next time, as in RLinf.

The level may differ between numbers, as a diagonal diffusion keeps the marginals too; at level 0 the step is Euler's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from perennial.randomness import stream

TIME_ALPHA, TIME_BETA, TIME_LEAST = 1.5, 1.0, 0.001
"""Training times are TIME_LEAST + (1 - TIME_LEAST) Beta(TIME_ALPHA, TIME_BETA), as published for pi-0."""


def transition(x: Tensor, velocity: Tensor, index: Tensor, steps: int, level: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the state after denoising step `index`, float32 [N, H, P] each.

    Args:
        x: [N, H, P], the state at time 1 - index / steps.
        velocity: [N, H, P], the model's at `x` and that time.
        index: int64 [N], 0 .. steps - 1.
        steps: denoising steps in all.
        level: noise level a, broadcast to [N, H, P].
    """
    delta = 1 / steps
    time = (1 - index.to(x.dtype) / steps)[:, None, None]
    variance = level**2 * time / (1 - time).clamp(min=delta)
    expected_noise = x + (1 - time) * velocity
    mean = x - delta * (velocity + variance / (2 * time) * expected_noise)
    return mean, (variance * delta).sqrt().expand_as(mean)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of the normal distribution in nats, elementwise."""
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def times(index: Tensor, steps: int) -> Tensor:
    """The flow time at the start of each denoising step `index` [N], float32 [N], from 1 down to 1 / steps."""
    return 1 - index.to(torch.float32) / steps


def training_noise(key: str, horizon: int, width: int) -> tuple[float, np.ndarray]:
    """Time in (0, 1] and noise float32 [H, P] of the row of an imitation batch that `key` names."""
    rng = stream(0, "flow matching", key)
    time = TIME_LEAST + (1 - TIME_LEAST) * rng.beta(TIME_ALPHA, TIME_BETA)
    return time, rng.standard_normal((horizon, width), dtype=np.float32)
