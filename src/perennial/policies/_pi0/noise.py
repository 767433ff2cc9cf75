"""Flow-Noise: a small network says how much noise each denoising step of pi-0 gets (pi_RL, arXiv 2510.25889).

A step from time t to t - d is N(x - v d, s^2) with the deviation s of every number read from the expert's hidden
state, that is from observation, noisy actions and time. The network learns together with the policy; at temperature 0
it is not used, so that it can be left out of what is deployed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from perennial.policies._pi0.config import Exploration, PI0Config
from perennial.randomness import stream

PREFIX = "noise_network."
HIDDEN = (128, 64)


class NoiseNetwork(nn.Module):
    """Hidden states of the action expert to standard deviations between two bounds, even in log-variance."""

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        self.fc1 = skip_init(nn.Linear, config.expert.width, HIDDEN[0])  # type: ignore[no-untyped-call]
        self.fc2 = skip_init(nn.Linear, HIDDEN[0], HIDDEN[1])  # type: ignore[no-untyped-call]
        self.fc3 = skip_init(nn.Linear, HIDDEN[1], config.max_action_dim)  # type: ignore[no-untyped-call]
        self.bounds = _log_bounds(config.exploration)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The weights to start from, the same everywhere: all deviations are the geometric mean of the bounds."""
        for name, parameter in self.named_parameters():
            parameter.zero_()
            if name in ("fc1.weight", "fc2.weight"):
                drawn = stream(0, "noise network", name).standard_normal(parameter.shape)
                parameter.copy_(torch.from_numpy(drawn / math.sqrt(parameter.shape[1])))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H, width] -> deviations float32 [N, H, P]."""
        low, high = self.bounds
        share = (1 + self.fc3(self.fc2(self.fc1(hidden).tanh()).tanh()).float().tanh()) / 2
        deviation: Tensor = (low + (high - low) * share).exp()
        return deviation


def _log_bounds(exploration: Exploration) -> tuple[float, float]:
    return math.log(exploration.lowest), math.log(exploration.highest)
