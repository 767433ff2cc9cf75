"""The regression head of the official OpenVLA-OFT checkpoints (Kim et al., arXiv 2502.19645, section IV.A).

Parameter names follow the files `action_head--*` beside a published checkpoint.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from perennial.policies._openvla.config import OpenVLAOFTConfig

BLOCKS = 2
"""Residual blocks of the published head."""


class RegressionHead(nn.Module):
    """Hidden states of the slots of an action, side by side, to its D numbers in about [-1, 1]."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.model = _Perceptron(config.action_dim * config.language.width, config.language.width, config.action_dim)
        self.chunk = config.chunk

    def forward(self, states: Tensor) -> Tensor:
        """[N, chunk * D, width] -> [N, chunk, D]."""
        out: Tensor = self.model(states.reshape(len(states), self.chunk, -1))
        return out


class _Perceptron(nn.Module):
    """A residual perceptron with layer norms before what learns."""

    def __init__(self, into: int, width: int, out: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(into)
        self.fc1 = nn.Linear(into, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Block(width) for _ in range(BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: Tensor = self.fc2(self.layer_norm2(x))
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.ffn(x)
        return out
