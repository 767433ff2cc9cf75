"""OpenVLA-OFT: all actions of a chunk as discrete tokens from one forward pass (Kim et al., arXiv 2502.19645).

The 7B checkpoint and the small default are this class with another config.

Action tokens follow OpenVLA (Kim et al., arXiv 2406.09246). A number in [-1, 1] falls into a bin between two of
`action_bins` equally spaced edges; bin i, counted from -1, is the vocabulary entry `vocab_size - 1 - i`. A sample holds
each token's place among the action entries of the vocabulary, `token - (vocab_size - action_bins)`, which is also its
row in the head; it falls from `action_bins - 1` for -1 to 0 for 1. Places 0 and 1 decode to the same centre.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from perennial.errors import PerennialError, not_installed
from perennial.policies import _images, _softmax, _tokenizer
from perennial.policies._anatomy import Anatomy
from perennial.policies._families import wrong_family
from perennial.policies._groups import by_prefix
from perennial.policies._openvla import anatomy as openvla_anatomy
from perennial.policies._openvla import published as openvla_published
from perennial.policies._openvla import settings as openvla_settings
from perennial.policies._openvla.config import NormStats, OpenVLAOFTConfig, Quantiles, small_config
from perennial.policies._placement import module_lists
from perennial.policies._sizes import widened
from perennial.policies._tensors import read_tensors, write_tensors
from perennial.policies._tokenizer import train_tokenizer
from perennial.policies._value_head import new_value_head
from perennial.policies.base import ActionChunk, Batch, Observation, Outputs, Policy
from perennial.policies.lora import unwrap
from perennial.randomness import integer_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from perennial.policies._openvla.model import OpenVLAOFTModel

__all__ = ["NormStats", "OpenVLAOFT", "OpenVLAOFTConfig", "Quantiles", "small_config", "train_tokenizer"]

GROUP_OF_MODULE = {
    "vision_backbone.": "vision",
    "projector.": "vision",
    "language_model.model.": "language",
    "language_model.lm_head.": "action",
    "proprio_projector.": "action",
    "action_head.": "action",
}


class OpenVLAOFT(Policy):
    """A fused-vision Llama that decides a chunk of actions at once.

    Each of the `config.chunk` actions is held for `config.hold` environment steps, so C = chunk x hold; the
    K = chunk x D tokens are ordered by action, then by dimension.
    """

    name: ClassVar[str] = "openvla_oft"
    published_chunk: ClassVar[int] = 8
    one_by_one: ClassVar[bool] = False
    regression: ClassVar[bool] = False

    def __init__(
        self,
        config: OpenVLAOFTConfig,
        tokenizer: Tokenizer,
        model: OpenVLAOFTModel,
        source: openvla_published.Source | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.tokenizer = tokenizer
        self.model = model.eval()
        self.groups: Mapping[str, Sequence[str]] = by_prefix(model, GROUP_OF_MODULE)
        self.chunk_steps = config.chunk * config.hold
        self.token_steps = np.repeat(np.arange(config.chunk) * config.hold, config.action_dim)
        self.image_size = config.camera_size or config.image_size
        self.bins = config.action_bins

    @classmethod
    def create(cls, config: OpenVLAOFTConfig, tokenizer: Tokenizer, seed: int) -> Self:
        """A new policy with random weights named by `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(seed, "policy"))
            return cls(config, tokenizer, _network(config))

    @classmethod
    def fresh(
        cls, sentences: Sequence[str], actions: np.ndarray, states: np.ndarray, seed: int, width: float = 1.0
    ) -> Self:
        """The small default with random weights; see `Policy.fresh`."""
        tokenizer = train_tokenizer(sentences)
        stats = NormStats(_quantiles(actions), _quantiles(states))
        bos = int(tokenizer.token_to_id(_tokenizer.BOS) or 0)
        config = small_config(tokenizer.get_vocab_size(), bos, stats, regression=cls.regression)
        return cls.create(widened(config, width), tokenizer, seed)

    def act(self, observation: Observation, temperature: float, rng: Sequence[np.random.Generator]) -> ActionChunk:
        """Decide by the inverse of each token's cumulative distribution at K uniform numbers per row."""
        with torch.inference_mode():
            logits = self.classify(unwrap(self.model)(*self._inputs(observation)))
            drawn = None if temperature == 0 else np.stack([one.random(self.config.tokens) for one in rng])
            sample, log_prob = choose(logits, temperature, drawn)
        choice = sample.cpu().numpy()
        return ActionChunk(self.decode(choice), choice, log_prob.cpu().numpy())

    def log_prob(self, batch: Batch) -> Tensor:
        """Log-probability of each token of `batch.sample`, float32 [N, K]."""
        return _softmax.log_prob(self.logits(batch), batch)

    def imitation_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of `batch.sample`, float32 [N], the mean over each row's unmasked tokens."""
        return _softmax.imitation_loss(self.logits(batch), batch)

    def logits(self, batch: Batch) -> Tensor:
        """Raw logits of the action bins, float32 [N, K, bins], in the order of `sample`."""
        return self.classify(self.features(batch))

    def add_value_head(self, seed: int) -> None:
        """A perceptron, in float32, on the hidden state that the first action token is read from."""
        self.value_head = new_value_head(self.config.language.width, seed).to(self.device)

    def value(self, batch: Batch) -> Tensor:
        """Values of the observations, float32 [N]."""
        return self._value(self.features(batch))

    def outputs(self, batch: Batch) -> Outputs:
        """All of them from one forward pass."""
        return _softmax.OnePass(self, batch, self.features, self.classify, self._value)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Tokens for the mean action of each held window of `actions` [N, C, D]; int64 [N, K]."""
        config = self.config
        unit = np.clip(self._unit(actions), -1, 1)
        bins = np.digitize(unit, np.linspace(-1, 1, config.action_bins)) - 1
        sample: np.ndarray = config.action_bins - 1 - bins
        return sample.reshape(len(actions), config.tokens)

    def decode(self, sample: np.ndarray) -> np.ndarray:
        """Actions float32 [N, C, D] that the tokens `sample` [N, K] stand for."""
        config = self.config
        edges = np.linspace(-1, 1, config.action_bins)
        bins = np.clip(config.action_bins - 1 - sample, 0, config.action_bins - 2)
        return self._actions(((edges[:-1] + edges[1:]) / 2)[bins])

    def _unit(self, actions: np.ndarray) -> np.ndarray:
        """The mean action of each held window of `actions` [N, C, D], normalised: float64 [N, chunk, D]."""
        config = self.config
        actions = _gripper_opening(actions) if config.gripper == "libero" else actions
        windows = actions.reshape(len(actions), config.chunk, config.hold, config.action_dim).mean(2, dtype=np.float64)
        return _normalise(windows, config.norm_stats.action)

    def _actions(self, unit: np.ndarray) -> np.ndarray:
        """Actions float32 [N, C, D], environment units, for K normalised numbers in each row of `unit`."""
        config = self.config
        unit = unit.reshape(len(unit), config.chunk, config.action_dim)
        actions = _unnormalise(unit, config.norm_stats.action).astype(np.float32)
        actions = _gripper_command(actions) if config.gripper == "libero" else actions
        return np.repeat(actions, config.hold, axis=1)

    def features(self, batch: Batch) -> Tensor:
        """Hidden states that the action tokens are read from, [N, K, width]; the first one knows no action."""
        states: Tensor = unwrap(self.model)(*self._inputs(batch.observation))
        return states

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the action bins, float32 [..., bins], from hidden states [..., width]."""
        head: Any = unwrap(self.model).language_model.lm_head  # type: ignore[union-attr]
        logits: Tensor = head(features.to(head.weight.dtype))
        return logits.float()

    def _value(self, states: Tensor) -> Tensor:
        assert self.value_head is not None, "add_value_head comes first"
        value: Tensor = self.value_head(states[:, 0].float())
        return value

    def _inputs(self, observation: Observation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels, prompt, its mask and the state, as `OpenVLAOFTModel` wants them."""
        config, device = self.config, self.device
        views = observation.images.shape[1]
        if views != config.views:
            raise PerennialError(
                f"The policy looks through {config.views} cameras, but the observation has {views}; "
                "choose a checkpoint that was trained on this suite."
            )
        prompt, mask = _tokenizer.tokenize(
            self.tokenizer, observation.instructions, config.bos_token_id, config.max_prompt_length, config.prompt_end
        )
        state = np.zeros((len(observation), 0))
        if config.use_proprio and config.norm_stats.proprio is not None:
            if observation.states.shape[1] != config.state_dim:
                raise PerennialError(
                    f"The policy reads {config.state_dim} state numbers, but the observation has "
                    f"{observation.states.shape[1]}; choose a checkpoint that was trained on this suite."
                )
            state = np.clip(_normalise(observation.states, config.norm_stats.proprio), -1, 1)
        dtype = next(self.model.parameters()).dtype
        prepared = _images.cropped if config.center_crop else _images.stretched
        return (
            prepared(observation.images, config.image_size, device),
            torch.from_numpy(prompt).to(device),
            torch.from_numpy(mask).to(device),
            torch.from_numpy(state).to(device, dtype),
        )

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Self:
        """Load a checkpoint that `save` wrote, or a published one.

        Args:
            folder: as this class writes it (config.json, tokenizer.json, model.safetensors), or as on the Hugging Face
                hub (see `_openvla.published`).
            dtype: of the weights; None takes what perennial.json says, float32 where it says nothing.
            device: where the weights go.

        Raises:
            PerennialError: a file is missing or damaged, or the checkpoint does not fit this policy.
        """
        if openvla_published.is_published(folder):
            source, config, tokenizer = openvla_published.read_description(folder, cls.published_chunk, cls.regression)
            model = _network(config, "absent")
            chosen = dtype or getattr(torch, source.settings.dtype)
            openvla_published.read_weights(source, config, model, chosen, torch.device(device))
            return cls(config, tokenizer, model.to(device), source)
        return cls._load_own(folder, dtype or torch.float32, device)

    @classmethod
    def _load_own(cls, folder: Path, dtype: torch.dtype, device: str) -> Self:
        content = openvla_settings.read_json(folder / "config.json")
        if "openvla_oft" not in content or content.get("policy", cls.name) != cls.name:
            raise wrong_family(folder, content, cls.name)
        tokenizer = _tokenizer.read_tokenizer(folder, "copy the folder again")
        if not (folder / "model.safetensors").is_file():
            raise PerennialError(f"The checkpoint {folder} has no model.safetensors; copy the folder again.")
        try:
            config = OpenVLAOFTConfig.from_json(content["openvla_oft"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PerennialError(
                f"config.json in {folder} cannot be read ({error!r}); copy the folder again."
            ) from error
        model = _network(config, "unset")
        read_tensors(folder / "model.safetensors", model)
        for parameter in model.parameters():  # not the rotary frequencies: rounding them would shift positions
            parameter.data = parameter.data.to(dtype)
        return cls(config, tokenizer, model.to(device))

    @classmethod
    def anatomy(cls, folder: Path | None, instruction: str) -> Anatomy:
        """See `Policy.anatomy`."""
        return openvla_anatomy.read(folder, cls.published_chunk, instruction, cls.one_by_one, cls.regression)

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of both vision towers and of the Llama."""
        return module_lists(unwrap(self.model))

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the base checkpoint, an adapter merged in, with weights of `dtype` (default: as they are).

        A policy that was read from a published folder is written in the published layout.
        """
        if self.source is not None:
            chosen = dtype or next(self.model.parameters()).dtype
            openvla_published.write_checkpoint(folder, self.source, self.config, self.model, chosen)
            return
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"policy": self.name, "openvla_oft": self.config.to_json()}, indent=2)
        (folder / "config.json").write_text(content + "\n")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_tensors(folder / "model.safetensors", self.acting_weights(), dtype)


def _quantiles(values: np.ndarray) -> Quantiles:
    """The 1st and 99th percentile of each column of `values` [L, D]."""
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    return Quantiles(tuple(map(float, low)), tuple(map(float, high)))


def _network(config: OpenVLAOFTConfig, weights: Literal["random", "unset", "absent"] = "random") -> OpenVLAOFTModel:
    """The network; with absent weights its parameters lie on the meta device, its buffers do not."""
    try:
        from transformers.initialization import no_init_weights

        from perennial.policies._openvla.model import OpenVLAOFTModel

        if weights == "random":
            return OpenVLAOFTModel(config)
        with ExitStack() as stack:
            stack.enter_context(no_init_weights())
            if weights == "absent":
                from accelerate import init_empty_weights

                stack.enter_context(init_empty_weights(include_buffers=False))
            return OpenVLAOFTModel(config)
    except ModuleNotFoundError as error:
        raise not_installed("OpenVLA-OFT", "vla", error) from error


def choose(logits: Tensor, temperature: float, uniform: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Choose among bins by the inverse of the cumulative distribution, or greedily at temperature 0.

    Args:
        logits: raw, [N, K, bins].
        temperature: 0 or above.
        uniform: numbers in [0, 1), [N, K]; None where the temperature is 0.

    Returns:
        sample: int64 [N, K].
        log_prob: float32 [N, K] at the temperature, 0 for greedy choices.
    """
    if uniform is None:
        sample = logits.argmax(-1)
        return sample, torch.zeros(sample.shape)
    log_probs = (logits / temperature).log_softmax(-1)
    sample = _inverse_cdf(log_probs, uniform)
    return sample, log_probs.gather(-1, sample[..., None]).squeeze(-1)


def _inverse_cdf(log_probs: Tensor, uniform: np.ndarray) -> Tensor:
    """The first bin whose cumulative probability exceeds the uniform number, int64 [N, K]."""
    cumulative = log_probs.double().exp().cumsum(-1)
    target = torch.from_numpy(uniform).to(log_probs.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=log_probs.shape[-1] - 1)


def _normalise(values: np.ndarray, stats: Quantiles) -> np.ndarray:
    """Map q01..q99 to -1..1; a dimension that never moved becomes 0."""
    low, high = np.array(stats.q01), np.array(stats.q99)
    span = np.where(high > low, high - low, 1.0)
    unit = np.where(high > low, 2 * (values - low) / span - 1, 0.0)
    return np.where(_mask(stats), unit, values)


def _unnormalise(unit: np.ndarray, stats: Quantiles) -> np.ndarray:
    """Map -1..1 to q01..q99."""
    low, high = np.array(stats.q01), np.array(stats.q99)
    return np.where(_mask(stats), (unit + 1) / 2 * (high - low) + low, unit)


def _gripper_command(actions: np.ndarray) -> np.ndarray:
    """LIBERO's gripper: the last number, 0 closed to 1 open, becomes -1 (open) or 1 (closed)."""
    return np.concatenate([actions[..., :-1], -np.sign(2 * actions[..., -1:] - 1)], axis=-1)


def _gripper_opening(actions: np.ndarray) -> np.ndarray:
    """The inverse of `_gripper_command`."""
    return np.concatenate([actions[..., :-1], (1 - actions[..., -1:]) / 2], axis=-1)


def _mask(stats: Quantiles) -> np.ndarray:
    return np.array(stats.mask or (True,) * len(stats.q01))
