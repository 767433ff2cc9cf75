"""Policies that decide by flow matching: acting, log-probabilities, imitation and values, whatever the network.

Acting moves noise along the learned flow to actions. At temperature 0 it starts from the noise's mean and takes Euler
steps. Above, it starts from random noise, and one denoising step of each decision, or every one, is a Gaussian
transition of Flow-SDE (pi_RL, arXiv 2510.25889), whose log-density is the policy's log-probability; the temperature
multiplies its noise level and leaves the marginals alone. With Flow-Noise (see `_pi0.noise`) every step is stochastic,
with deviations that are learned.

A log-probability belongs to one action, K = H: the sum over its D numbers and over the stochastic steps, and 0 for the
actions from C on, which are never executed. Only C x D numbers of the H x P of the flow are given noise, so the
log-probabilities together are the whole density of the stochastic transitions. RLinf differs: it gives noise to all
H x P numbers and counts C x D of them, sums over the chunk for one ratio per decision, averages over steps where all
are stochastic, and draws one step for the batch.

A sample is float32 [N, 1 + S H P]: the number of the stochastic step (0 if all are, -1 where there is no path, as in
demonstrations), then S states of the flow: that before the step, that after it and the last (S = 3), or all of them
from noise to actions (S = denoising steps + 1).
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from perennial.errors import PerennialError
from perennial.policies import _tokenizer
from perennial.policies._flow import lerobot_layout, sde
from perennial.policies._pi0.config import Moments, PI0Config
from perennial.policies._sizes import widened
from perennial.policies._tensors import write_tensors
from perennial.policies._value_head import new_value_head
from perennial.policies.base import ActionChunk, Batch, Observation, Outputs, Policy
from perennial.policies.lora import unwrap
from perennial.randomness import integer_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class FlowPolicy(Policy):
    """A network that predicts the velocity of H actions, of which the first C are carried out open loop.

    Attributes:
        tokenizer_of: the repository whose tokenizer a checkpoint needs.
        names: of the tensors in published files.
        source: the folder in LeRobot's layout that the policy was read from.
    """

    tokenizer_of: ClassVar[str]
    names: ClassVar[lerobot_layout.Names]

    def __init__(self, config: PI0Config, tokenizer: Tokenizer, model: Any, source: Path | None = None) -> None:
        self.config = config
        self.source = source
        self.tokenizer = tokenizer
        self.model = model.eval()
        self.groups: Mapping[str, Sequence[str]] = model.groups()
        self.chunk_steps = config.executed
        self.token_steps = np.arange(config.horizon)
        self.image_size = config.camera_size or config.image_size

    @classmethod
    def create(cls, config: PI0Config, tokenizer: Tokenizer, seed: int) -> Self:
        """A new policy with random weights named by `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(seed, "policy"))
            return cls(config, tokenizer, cls._build(config, random=True))

    @classmethod
    def fresh(
        cls, sentences: Sequence[str], actions: np.ndarray, states: np.ndarray, seed: int, width: float = 1.0
    ) -> Self:
        """The small default with random weights; see `Policy.fresh`."""
        from tokenizers.normalizers import Lowercase

        tokenizer = _tokenizer.train_tokenizer(sentences)
        tokenizer.normalizer = Lowercase()
        return cls.create(widened(cls._small(tokenizer, _moments(states), _moments(actions)), width), tokenizer, seed)

    @property
    def imitated_steps(self) -> int:
        """H, of which C are executed."""
        return self.config.horizon

    @torch.inference_mode()
    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """Integrate the flow; a row draws its stochastic step, its first noise and the noise of its steps, in turn."""
        config, rows = self.config, len(observation)
        if temperature == 0:
            index, noise = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 1, config.horizon, 1)
        else:
            drawn = [self._draw(generator) for generator in rng]
            index = torch.tensor([step for step, _ in drawn])
            noise = torch.from_numpy(np.stack([numbers for _, numbers in drawn]))
        index, noise = index.to(self.device), noise.to(self.device)
        prefix, state = self._prefix(observation), self._state(observation)
        x = noise[:, 0].expand(-1, -1, config.max_action_dim)
        states = [x]
        log_prob = torch.zeros(rows, config.horizon, device=self.device)
        for step in range(config.denoising_steps):
            now = torch.full_like(index, step)
            chosen = (index == now) if config.exploration.steps == "one" else torch.ones_like(index, dtype=torch.bool)
            level = self._level(temperature) * chosen[:, None, None]
            mean, std = self._transition(prefix, state, x, now, level)
            x = mean + std * noise[:, 1 if config.exploration.steps == "one" else 1 + step] if temperature else mean
            states.append(x)
            if temperature:
                log_prob += torch.where(chosen[:, None], self._log_density(x, mean, std), 0.0)
        path = torch.stack(states, dim=1)
        if config.exploration.steps == "one":
            row = torch.arange(rows, device=self.device)
            path = torch.stack([path[row, index], path[row, index + 1], x], dim=1)
        sample = torch.cat([index[:, None], path.flatten(1)], dim=1).cpu().numpy()
        return ActionChunk(self.decode(sample), sample, log_prob.cpu().numpy())

    def log_prob(self, batch: Batch) -> Tensor:
        """Log-density of the stochastic transitions of each action, float32 [N, H]; from C on it is 0.

        Raises:
            PerennialError: the batch holds demonstrations.
        """
        return self._path_log_prob(batch, self._prefix(batch.observation), self._state(batch.observation))

    def add_value_head(self, seed: int) -> None:
        """A perceptron, in float32, on the expert's hidden state; see `value`."""
        self.value_head = new_value_head(self.config.expert.width, seed).to(self.device)

    def value(self, batch: Batch) -> Tensor:
        """Values of the observations, float32 [N].

        They are read from the expert's hidden state, the mean over the executed actions, as pi_RL reads its critic.
        Theirs sees the noisy actions of every denoising step and is averaged over the steps. Here the expert sees the
        mean of the noise at time 1, so that a value knows nothing of what was drawn.
        """
        return self._value(self._prefix(batch.observation), self._state(batch.observation))

    def outputs(self, batch: Batch) -> Outputs:
        """Log-probability and value from one pass over images and prompt."""
        return _OnePass(self, batch)

    def _value(self, prefix: Any, state: Tensor) -> Tensor:
        assert self.value_head is not None, "add_value_head comes first"
        config = self.config
        noise = torch.zeros(len(state), config.horizon, config.max_action_dim, device=self.device)
        hidden = self._network.hidden(prefix, state, noise, noise.new_ones(len(state)))
        value: Tensor = self.value_head(hidden[:, : config.executed].float().mean(1))
        return value

    def _path_log_prob(self, batch: Batch, prefix: Any, state: Tensor) -> Tensor:
        index, path = self._unpack(batch.sample)
        if bool((index < 0).any()):
            raise PerennialError(
                f"{self.name} has no log-probability for demonstrations, only for actions that it sampled; "
                "imitate them instead."
            )
        level = self._level(batch.temperature)
        total = torch.zeros(len(batch), self.config.horizon, device=self.device)
        for step in range(path.shape[1] - 1 if self.config.exploration.steps == "all" else 1):
            before, after = path[:, step], path[:, step + 1]
            mean, std = self._transition(prefix, state, before, index + step, level)
            total = total + self._log_density(after, mean, std)
        return total

    def imitation_loss(self, batch: Batch) -> Tensor:
        """Flow-matching loss of the decided actions, float32 [N], the mean over unmasked actions and their D numbers.

        Of a demonstration all H actions are learned, executed or not, as the expert attends to all of them. It sees the
        last unmasked action in the place of every later one, so masked ones play no part at all: at the end of an
        episode, and from C on where the actions are the policy's own.

        Each row's noise and time come from a stream named by what the row observes and by the weights as they are now:
        the loss is a function of policy and batch, whatever the batch's order, while every optimiser step sees new
        noise.
        """
        config = self.config
        _, path = self._unpack(batch.sample)
        last = np.where(batch.mask, np.arange(config.horizon), 0).max(axis=1)
        place = torch.from_numpy(np.minimum(np.arange(config.horizon), last[:, None])).to(self.device)
        actions = path[:, -1].gather(1, place[..., None].expand_as(path[:, -1])) * self._used()
        drawn = [
            sde.training_noise(key, config.horizon, config.max_action_dim) for key in self._keys(batch.observation)
        ]
        time = torch.tensor([t for t, _ in drawn], dtype=torch.float32, device=self.device)
        noise = torch.from_numpy(np.stack([numbers for _, numbers in drawn])).to(self.device)
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        state = self._state(batch.observation)
        velocity = self._network.velocity(self._prefix(batch.observation), state, noisy, time)
        error = ((velocity - (noise - actions)) ** 2)[..., : config.action_dim].mean(-1)
        mask = torch.from_numpy(batch.mask).to(error.device)
        loss: Tensor = (error * mask).sum(1) / mask.sum(1).clamp(min=1)
        return loss

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """The sample without a path for `actions` [N, H, D], or fewer, the last of which is repeated up to H."""
        config = self.config
        mean, std = np.array(config.action.mean), np.array(config.action.std)
        unit = np.where(std > 0, (actions - mean) / np.where(std > 0, std, 1), 0)
        given = np.minimum(np.arange(config.horizon), actions.shape[1] - 1)
        chunk = np.zeros((len(actions), config.horizon, config.max_action_dim), np.float32)
        chunk[..., : config.action_dim] = unit[:, given]
        path = np.repeat(chunk[:, None], 3 if config.exploration.steps == "one" else config.denoising_steps + 1, axis=1)
        return np.concatenate([np.full((len(actions), 1), -1, np.float32), path.reshape(len(actions), -1)], axis=1)

    def decode(self, sample: np.ndarray) -> np.ndarray:
        """Actions float32 [N, C, D], environment units, that `sample` ends in."""
        config = self.config
        chunk = sample[:, 1:].reshape(len(sample), -1, config.horizon, config.max_action_dim)[:, -1]
        unit = chunk[:, : config.executed, : config.action_dim].astype(np.float64)
        actions: np.ndarray = np.array(config.action.mean) + unit * np.array(config.action.std)
        return actions.astype(np.float32)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Self:
        """Load a checkpoint of ours or in LeRobot's layout; the weights become `dtype` (float32)."""
        config = cls._read_config(folder)
        tokenizer = _tokenizer.read_tokenizer(folder, f"put that of {cls.tokenizer_of} into it")
        model = cls._build(config, random=False)
        for parameter in model.parameters():  # not the rotary frequencies: rounding them would shift positions
            parameter.data = parameter.data.to(dtype or torch.float32)
        lerobot_layout.read_weights(folder, model, cls.names)
        published = lerobot_layout.is_published(folder, cls.name)
        return cls(config, tokenizer, model.to(device), folder if published else None)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the base checkpoint, an adapter merged in, with weights of `dtype` (default: as they are).

        A policy that was read from LeRobot's layout is written in it.
        """
        if self.source is not None:
            lerobot_layout.write(folder, self.source, self.model, self.names, dtype or self._network.dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"policy": self.name, self.name: self.config.to_json()}, indent=2)
        (folder / "config.json").write_text(content + "\n")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_tensors(folder / "model.safetensors", self.acting_weights(), dtype)

    @classmethod
    @abstractmethod
    def _small(cls, tokenizer: Tokenizer, state: Moments, action: Moments) -> PI0Config:
        """The small default."""

    @classmethod
    @abstractmethod
    def _build(cls, config: Any, random: bool) -> Any:
        """The network, with weights drawn from torch's generator or still to be read.

        Raises:
            PerennialError: a package is missing.
        """

    @classmethod
    @abstractmethod
    def _read_config(cls, folder: Path) -> PI0Config:
        """The sizes of a checkpoint."""

    @abstractmethod
    def _prefix(self, observation: Observation) -> Any:
        """What the network keeps of images and prompt for all denoising steps."""

    @abstractmethod
    def _prepared(self, images: np.ndarray) -> Tensor:
        """Images uint8 [N, V, H, W, 3] in the size that the network reads, float32 [N, V, 3, S, S] in [0, 1]."""

    @abstractmethod
    def _ids(self, instruction: str) -> list[int]:
        """The prompt's tokens."""

    def _draw(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """The stochastic step of one row, and noise [1 + stochastic steps, H, P], the start of the flow first."""
        config = self.config
        one = config.exploration.steps == "one"
        step = int(rng.integers(config.denoising_steps)) if one else 0
        shape = (2 if one else 1 + config.denoising_steps, config.horizon, config.max_action_dim)
        return step, rng.standard_normal(shape, dtype=np.float32)

    def _unpack(self, sample: np.ndarray) -> tuple[Tensor, Tensor]:
        """Step numbers int64 [N] and states float32 [N, S, H, P]."""
        values = torch.from_numpy(sample).to(self.device)
        path = values[:, 1:].view(len(sample), -1, self.config.horizon, self.config.max_action_dim)
        return values[:, 0].long(), path

    def _seen(self, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels in [-1, 1], prompt and its mask, as the network's `prefix` wants them."""
        config, views = self.config, observation.images.shape[1]
        if views > config.views:
            raise PerennialError(
                f"The policy looks through at most {config.views} cameras, but the observation has {views}; "
                "choose a checkpoint that was trained on this suite."
            )
        prompt, mask = _padded({text: self._ids(text) for text in observation.instructions}, observation, config)
        pixels = self._prepared(observation.images) * 2 - 1
        return pixels, torch.from_numpy(prompt).to(self.device), torch.from_numpy(mask).to(self.device)

    def _state(self, observation: Observation) -> Tensor:
        """Normalised states, padded with zeros, float32 [N, max_state_dim]."""
        stats, wanted = self.config.state, len(self.config.state.mean)
        if observation.states.shape[1] != wanted:
            raise PerennialError(
                f"The policy reads {wanted} state numbers, but the observation has {observation.states.shape[1]}; "
                "choose a checkpoint that was trained on this suite."
            )
        mean, std = np.array(stats.mean), np.array(stats.std)
        unit = np.where(std > 0, (observation.states - mean) / np.where(std > 0, std, 1), 0).astype(np.float32)
        padded = np.pad(unit, ((0, 0), (0, self.config.max_state_dim - wanted)))
        return torch.from_numpy(padded).to(self.device)

    @property
    def _network(self) -> Any:
        return unwrap(self.model)

    def _transition(self, prefix: Any, state: Tensor, x: Tensor, index: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the flow after denoising step `index` [N] from `x`, float32 [N, H, P]."""
        steps, network = self.config.denoising_steps, self._network
        hidden = network.hidden(prefix, state, x, sde.times(index, steps))
        velocity = network.read_velocity(hidden)
        if network.noise_network is None:
            return sde.transition(x, velocity, index, steps, level)
        return x - velocity / steps, network.noise_network(hidden) * level

    def _log_density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-density of each executed action, the sum over its D numbers, and 0 of the others; float32 [N, H]."""
        c, d = self.config.executed, self.config.action_dim
        density = sde.log_density(x[:, :c, :d], mean[:, :c, :d], std[:, :c, :d]).sum(-1)
        return torch.nn.functional.pad(density, (0, self.config.horizon - c))

    def _used(self) -> Tensor:
        """1 for the D numbers that mean something, 0 for padding; float32 [P]."""
        return (torch.arange(self.config.max_action_dim, device=self.device) < self.config.action_dim).float()

    def _level(self, temperature: float) -> Tensor:
        """What noise is multiplied by for each number of the flow, 0 where it is not executed; float32 [1, H, P]."""
        executed = (torch.arange(self.config.horizon, device=self.device) < self.config.executed).float()
        exploration = self.config.exploration
        level = exploration.level if exploration.method == "sde" else 1.0
        return level * temperature * (executed[:, None] * self._used())[None]

    def _keys(self, observation: Observation) -> list[str]:
        """What names each row's noise: images, state and instruction, and the first number of each trainable tensor."""
        numbers = [parameter.detach().flatten()[0].float() for parameter in self.trainable().values()]
        weights = torch.stack(numbers).cpu().numpy().tobytes() if numbers else b""
        keys = []
        for images, state, text in zip(observation.images, observation.states, observation.instructions, strict=True):
            row = (np.ascontiguousarray(images).data, np.ascontiguousarray(state).data, text.encode(), weights)
            keys.append(hashlib.sha256(b"".join(row)).hexdigest())
        return keys


class _OnePass(Outputs):
    policy: FlowPolicy

    @cached_property
    def _seen(self) -> tuple[Any, Tensor]:
        return self.policy._prefix(self.batch.observation), self.policy._state(self.batch.observation)

    @cached_property
    def log_prob(self) -> Tensor:
        return self.policy._path_log_prob(self.batch, *self._seen)

    @cached_property
    def value(self) -> Tensor:
        return self.policy._value(*self._seen)


def _moments(values: np.ndarray) -> Moments:
    """Mean and deviation of each column of `values` [L, D]."""
    return Moments(tuple(map(float, values.mean(0))), tuple(map(float, values.std(0))))


def _padded(
    known: Mapping[str, Sequence[int]], observation: Observation, config: PI0Config
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts of the observation's instructions, padded on the right to the longest of them.

    Returns:
        ids: int64 [N, P].
        mask: bool [N, P], False at padding.
    """
    text, ids = max(known.items(), key=lambda item: len(item[1]))
    if len(ids) > config.max_prompt_length:
        raise PerennialError(
            f"The instruction {text!r} takes {len(ids)} tokens, but the policy reads {config.max_prompt_length}; "
            "shorten it."
        )
    prompts = np.full((len(observation), len(ids)), ids[0], dtype=np.int64)
    mask = np.zeros(prompts.shape, dtype=bool)
    for row, instruction in enumerate(observation.instructions):
        ids = known[instruction]
        prompts[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return prompts, mask
