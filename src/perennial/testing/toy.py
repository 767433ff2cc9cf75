"""A suite and a policy small enough that a whole continual run takes seconds, without a simulator.

Both live in this one module, so `{"toy": "perennial.testing.toy"}` makes either discoverable by name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from perennial import randomness
from perennial.errors import PerennialError, unknown
from perennial.policies._softmax import OnePass
from perennial.policies._value_head import new_value_head
from perennial.policies.base import ActionChunk, Batch, Observation, Outputs, Policy
from perennial.policies.lora import unwrap
from perennial.suites import base as suites
from perennial.suites.base import Environment, Suite, Task

STEP = 0.15
"""How far the point moves in one step at full action."""
RADIUS = 0.25
"""The task is solved within this distance of the target."""
START = {"id": 0.2, "ood_val": 0.3, "ood_test": 0.4}
"""Half the side of the square around the centre in which an episode of each variant starts."""


def _reach(name: str, direction: str) -> Task:
    instructions = (f"go {direction}", f"move the point {direction}")
    return Task(name, instructions, evaluation_instruction=f"please move {direction}", horizon=10)


class ToyEnvironment(Environment):
    """A point in the plane [-1, 1]^2 that has to reach `target`.

    The state is the position, float32 [2]; the image shows the point on a dark ground, the target is not drawn.
    """

    def __init__(self, task: Task, target: np.ndarray, variant: str, image_size: int) -> None:
        self.task = task
        self.target = target
        self.variant = variant
        self.image_size = image_size
        self.position = np.zeros(2, np.float32)
        self.steps = 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Go to the initial state `options = {"split", "index"}`; training state 0 without options."""
        split, index = (options["split"], options["index"]) if options else ("training", 0)
        rng = randomness.stream(0, "toy", self.task.name, self.variant, split, index)
        self.position = rng.uniform(-START[self.variant], START[self.variant], 2).astype(np.float32)
        self.steps = 0
        return self.position.copy(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move by `action`, float32 [2] in [-1, 1]."""
        moved = self.position + STEP * np.clip(action, -1.0, 1.0)
        self.position = np.clip(moved, -1.0, 1.0).astype(np.float32)
        self.steps += 1
        dx, dy = self.position - self.target
        success = bool(dx * dx + dy * dy < RADIUS**2)
        truncated = not success and self.steps >= self.task.horizon
        return self.position.copy(), float(success), success, truncated, {"is_success": success}

    def render(self) -> Any:
        """The point, uint8 [1, H, W, 3]."""
        return self._draw(self.image_size)[None]

    def film(self, size: int) -> np.ndarray:
        """The point and, in green, its target, uint8 [size, size, 3]."""
        picture = self._draw(size)
        picture[self._square(self.target, size)] = (40, 200, 80)
        picture[self._square(self.position, size)] = 255
        return picture

    def _draw(self, size: int) -> np.ndarray:
        picture = np.full((size, size, 3), 20, np.uint8)
        picture[self._square(self.position, size)] = 255
        return picture

    @staticmethod
    def _square(position: np.ndarray, size: int) -> tuple[slice, slice]:
        side = max(1, size // 8)
        column, row = ((position * (1, -1) + 1) / 2 * (size - side)).round().astype(int)
        return slice(row, row + side), slice(column, column + side)


def reach(environment: Environment) -> np.ndarray:
    """The scripted expert: straight to the target."""
    assert isinstance(environment, ToyEnvironment)
    action: np.ndarray = np.clip((environment.target - environment.position) / STEP, -1.0, 1.0)
    return action.astype(np.float32)


class ToySuite(Suite):
    """Reaching tasks in the plane, told apart only by the instruction."""

    name: ClassVar[str] = "toy"
    targets: ClassVar[Mapping[str, tuple[float, float]]] = {
        "left": (-0.7, 0.0),
        "right": (0.7, 0.0),
        "up": (0.0, 0.7),
        "down": (0.0, -0.7),
        "up-left": (-0.5, 0.5),
        "down-right": (0.5, -0.5),
    }
    tasks: Mapping[str, Task] = {name: _reach(name, name.replace("-", " and ")) for name in targets}
    sequences: Mapping[str, suites.Sequence] = {
        "default": suites.Sequence(("left", "right", "up", "down"), ("up-left", "down-right")),
        "pair": suites.Sequence(("left", "right"), ("up-left",)),
    }
    variants = tuple(START)
    state_dim = 2
    action_dim = 2

    def make(self, task: str, variant: str = "id", image_size: int = 8) -> ToyEnvironment:
        """Build the environment of `task`.

        Raises:
            PerennialError: unknown task or variant.
        """
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        if variant not in self.variants:
            raise unknown("variant", variant, self.variants)
        return ToyEnvironment(self.tasks[task], np.array(self.targets[task], np.float32), variant, image_size)

    def expert(self, task: str) -> suites.Expert:
        """The straight line."""
        return reach


class ToyModel(nn.Module):
    """Image, instruction and state, added up, through two layers to logits [N, K, bins]."""

    def __init__(self, hidden: int, words: int, tokens: int, bins: int) -> None:
        super().__init__()
        self.vision = nn.Linear(16, hidden)
        self.language = nn.Linear(words, hidden)
        self.state = nn.Linear(2, hidden)
        self.trunk = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, tokens * bins)
        self.bins = bins

    def forward(self, image: Tensor, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 16], bag of words [N, words] and positions [N, 2] in; logits and hidden states out."""
        hidden = torch.tanh(self.vision(image) + self.language(words) + self.state(state))
        hidden = torch.tanh(self.trunk(hidden))
        return self.head(hidden).unflatten(-1, (-1, self.bins)), hidden


class ToyPolicy(Policy):
    """A few linear layers that choose among 9 bins for each of 2 action numbers of 2 steps (K = 4)."""

    name: ClassVar[str] = "toy"
    groups: Mapping[str, Sequence[str]] = {
        "vision": ("vision.weight", "vision.bias"),
        "language": ("language.weight", "language.bias"),
        "action": tuple(f"{layer}.{kind}" for layer in ("state", "trunk", "head") for kind in ("weight", "bias")),
    }
    chunk_steps = 2
    token_steps = np.array([0, 0, 1, 1])
    image_size = 8
    words = 64
    centres = np.linspace(-1, 1, 9, dtype=np.float32)
    bins = len(centres)

    def __init__(self, seed: int = 0, hidden: int = 32) -> None:
        self.hidden = hidden
        self.model: nn.Module = ToyModel(hidden, self.words, len(self.token_steps), len(self.centres))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                rng = randomness.stream(seed, "toy", name)
                scale = 0.0 if name.endswith("bias") else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.from_numpy(rng.normal(0.0, scale, tuple(parameter.shape))))

    def _forward(self, observation: Observation) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.ascontiguousarray(observation.images)).float().mean((1, 4)) / 255
        image = functional.adaptive_avg_pool2d(images[:, None], 4).flatten(1)
        words = np.zeros((len(observation), self.words), np.float32)
        for row, instruction in enumerate(observation.instructions):
            for word in instruction.lower().split():
                words[row, zlib.crc32(word.encode()) % self.words] += 1.0
        like = next(self.model.parameters())
        inputs = (image, torch.from_numpy(words), torch.from_numpy(observation.states))
        logits, hidden = self.model(*(values.to(like.device, like.dtype) for values in inputs))
        wide = torch.promote_types(like.dtype, torch.float32)
        return logits.to(wide), hidden.to(wide)

    @torch.no_grad()
    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """Decide for every row, by the inverse of the cumulative distribution at one uniform number per token."""
        logits, _ = self._forward(observation)
        if temperature == 0:
            sample = logits.argmax(-1)
            log_prob = torch.zeros(sample.shape)
        else:
            log_probs = (logits / temperature).log_softmax(-1)
            cumulative = log_probs.double().exp().cumsum(-1)
            uniform = torch.from_numpy(np.stack([generator.random(logits.shape[1]) for generator in rng]))
            sample = (cumulative < uniform[..., None]).sum(-1).clamp(max=logits.shape[-1] - 1)
            log_prob = log_probs.gather(-1, sample[..., None]).squeeze(-1)
        actions = self.centres[sample.numpy()].reshape(len(observation), self.chunk_steps, -1)
        return ActionChunk(actions, sample.numpy(), log_prob.numpy())

    def log_prob(self, batch: Batch) -> Tensor:
        """Log-probability of the tokens, float32 [N, K]."""
        log_probs = (self.logits(batch) / batch.temperature).log_softmax(-1)
        return log_probs.gather(-1, torch.from_numpy(batch.sample)[..., None]).squeeze(-1)

    def imitation_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy at temperature 1, float32 [N], mean over each row's unmasked tokens."""
        mask = torch.from_numpy(batch.mask)
        losses = functional.cross_entropy(self.logits(batch).mT, torch.from_numpy(batch.sample), reduction="none")
        return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """The nearest bins, int64 [N, K]."""
        nearest: np.ndarray = np.abs(actions[..., None] - self.centres).argmin(-1)
        return nearest.reshape(len(actions), -1)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the bins, float32 [N, K, 9]."""
        return self._forward(batch.observation)[0]

    def features(self, batch: Batch) -> Tensor:
        """The hidden state beside the number of the token as an indicator, float32 [N, K, hidden + K]."""
        hidden, tokens = self._forward(batch.observation)[1], len(self.token_steps)
        which = torch.eye(tokens, dtype=hidden.dtype).expand(len(hidden), -1, -1)
        return torch.cat([hidden[:, None].expand(-1, tokens, -1), which], dim=-1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the bins, float32 [..., 9]."""
        hidden, which = features[..., : self.hidden], features[..., self.hidden :]
        head: Any = unwrap(self.model).head
        logits: Tensor = head(hidden.to(head.weight.dtype)).to(features.dtype)
        return (logits.reshape(*which.shape, self.bins) * which[..., None]).sum(-2)

    def add_value_head(self, seed: int) -> None:
        """A linear layer on the hidden state."""
        self.value_head = new_value_head(self.hidden, seed, hidden=())

    def value(self, batch: Batch) -> Tensor:
        """Values of the observations, float32 [N]."""
        return self._value(self._forward(batch.observation))

    def outputs(self, batch: Batch) -> Outputs:
        """All of them from one forward pass."""
        return OnePass(self, batch, lambda seen: self._forward(seen.observation), itemgetter(0), self._value)

    def _value(self, logits_and_hidden: tuple[Tensor, Tensor]) -> Tensor:
        assert self.value_head is not None, "add_value_head comes first"
        value: Tensor = self.value_head(logits_and_hidden[1])
        return value

    @classmethod
    def fresh(
        cls, sentences: Sequence[str], actions: np.ndarray, states: np.ndarray, seed: int, width: float = 1.0
    ) -> Self:
        """A new policy; it reads any words, and its statistics are fixed."""
        return cls(seed, round(32 * width))

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, an adapter merged in."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"policy": self.name, "hidden": self.hidden}))
        weights = {name: weight.to(dtype or weight.dtype) for name, weight in self.acting_weights().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Self:
        """Load a base checkpoint.

        Raises:
            PerennialError: the folder is missing, truncated or does not fit this policy.
        """
        try:
            policy = cls(hidden=json.loads((folder / "config.json").read_text())["hidden"])
            policy.model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
            raise PerennialError(f"{folder} holds no readable toy checkpoint ({error}); save it again.") from error
        policy.model.to(device, dtype or torch.float32)
        return policy
