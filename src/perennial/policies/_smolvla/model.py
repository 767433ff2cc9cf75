"""The network of SmolVLA (Shukor et al., arXiv 2506.01844) on transformers' SmolVLM and Llama, in two passes.

The first pass runs the language model over images, prompt and state and keeps the keys and values of every layer; the
second runs the action expert over the noisy actions. In every other layer its actions attend to the prefix and to
actions before them, in the layers between only to the prefix, whose keys and values it projects once more. Parameter
names are those of LeRobot's `smolvla_base` without its leading "model.".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, SmolVLMConfig, SmolVLMModel
from transformers.initialization import no_init_weights

from perennial.policies._groups import by_prefix
from perennial.policies._pi0.config import Transformer
from perennial.policies._smolvla.config import SmolVLAConfig

GROUP_OF_MODULE = {
    "vlm_with_expert.vlm.model.vision_model.": "vision",
    "vlm_with_expert.vlm.model.connector.": "vision",
    "vlm_with_expert.vlm.model.text_model.": "language",
    "vlm_with_expert.lm_expert.": "action",
    "state_proj.": "action",
    "action_": "action",
}
SHORTEST, LONGEST = 4e-3, 4.0
"""Periods of the sines that the flow's time is told by."""
WAVELENGTH = 10_000.0
"""Of the rotary positions, whatever the language model was trained with."""


@dataclass(frozen=True)
class Prefix:
    """What the expert attends to: keys and values [N, heads, L, head_dim] of each layer, and a mask bool [N, L]."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor


class SmolVLANetwork(nn.Module):
    """Images, prompt, state and noisy actions in, velocity out."""

    noise_network = None

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        wide, narrow = config.language.width, config.expert.width
        self.vlm_with_expert = nn.Module()
        self.vlm_with_expert.vlm = nn.Module()
        self.vlm_with_expert.vlm.model = SmolVLMModel(_smolvlm(config))
        self.vlm_with_expert.lm_expert = _expert(config)
        self.state_proj = nn.Linear(config.max_state_dim, wide)
        self.action_in_proj = nn.Linear(config.max_action_dim, narrow)
        self.action_time_mlp_in = nn.Linear(2 * narrow, narrow)
        self.action_time_mlp_out = nn.Linear(narrow, narrow)
        self.action_out_proj = nn.Linear(narrow, config.max_action_dim)
        self.head_dim, self.self_attention_every = config.expert.head_dim, config.self_attention_every

    @classmethod
    def create(cls, config: SmolVLAConfig, random: bool) -> SmolVLANetwork:
        """The network in float32, with weights from torch's generator or with none that mean anything."""
        if random:
            return cls(config)
        with no_init_weights():
            return cls(config)

    def prefix(self, pixels: Tensor, prompt: Tensor, mask: Tensor, state: Tensor) -> Prefix:
        """The first pass; images and words see each other but not the state, which sees everything.

        Args:
            pixels: [N, V, 3, H, W] in [-1, 1].
            prompt: token ids [N, P], padded on the right.
            mask: bool [N, P], False at padding.
            state: normalised and padded, [N, max_state_dim].
        """
        vlm, rows = self._vlm, len(prompt)
        patches = vlm.connector(vlm.vision_model(pixels.to(self.dtype).flatten(0, 1)).last_hidden_state)
        patches = patches.reshape(rows, -1, patches.shape[-1])
        seen = torch.cat([patches, vlm.text_model.embed_tokens(prompt)], dim=1)
        hidden = torch.cat([seen * math.sqrt(seen.shape[-1]), self.state_proj(state.to(self.dtype))[:, None]], dim=1)
        columns = torch.cat([mask.new_ones(rows, patches.shape[1]), mask, mask.new_ones(rows, 1)], dim=1)
        visible = columns[:, None, None].repeat(1, 1, hidden.shape[1], 1)
        visible[:, :, :-1, -1] = False
        positions = (columns.cumsum(1) - 1).clamp(min=0)
        kept = []
        for number, layer in enumerate(vlm.text_model.layers, 1):
            normed = layer.input_layernorm(hidden)
            key = _rotate(self._heads(layer.self_attn.k_proj(normed)), positions)
            value = self._heads(layer.self_attn.v_proj(normed))
            kept.append((key, value))
            if number < len(vlm.text_model.layers):  # nothing reads what the last layer says
                query = _rotate(self._heads(layer.self_attn.q_proj(normed)), positions)
                hidden = _rest(layer, hidden, query, key, value, visible)
        return Prefix(tuple(kept), columns)

    def velocity(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The second pass: velocity float32 [N, H, P] of noisy actions; arguments as of `hidden`."""
        return self.read_velocity(self.hidden(prefix, state, noisy, time))

    def read_velocity(self, hidden: Tensor) -> Tensor:
        """Velocity float32 [N, H, P] from the expert's hidden states."""
        velocity: Tensor = self.action_out_proj(hidden).float()
        return velocity

    def hidden(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The expert's hidden states at the actions, [N, H, width].

        Args:
            prefix: what `prefix` gave.
            state: is in the prefix already.
            noisy: [N, H, P], noise at time 1 and actions at time 0.
            time: float32 [N].
        """
        told = self.action_in_proj(noisy.to(self.dtype))
        told = torch.cat([told, _sines(time, told.shape[-1]).to(told)[:, None].expand_as(told)], dim=2)
        hidden: Tensor = self.action_time_mlp_out(functional.silu(self.action_time_mlp_in(told)))
        rows, length = hidden.shape[:2]
        places = torch.arange(length, device=hidden.device)[None].expand(rows, -1)
        before = prefix.mask[:, None, None].expand(-1, 1, length, -1)
        earlier = torch.ones(rows, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
        expert: Any = self.vlm_with_expert.lm_expert
        for number, (layer, (key, value)) in enumerate(zip(expert.layers, prefix.layers, strict=True)):
            normed, attention, visible = layer.input_layernorm(hidden), layer.self_attn, before
            query = self._heads(attention.q_proj(normed))
            if number % self.self_attention_every == 0:
                positions = prefix.mask.sum(1, keepdim=True) + places
                query = _rotate(query, positions)
                key = torch.cat([key, _rotate(self._heads(attention.k_proj(normed)), positions)], dim=2)
                value = torch.cat([value, self._heads(attention.v_proj(normed))], dim=2)
                visible = torch.cat([before, earlier], dim=3)
            else:
                query = _rotate(query, places)
                key = self._heads(attention.k_proj(key.transpose(1, 2).flatten(2)))
                value = self._heads(attention.v_proj(value.transpose(1, 2).flatten(2)))
            hidden = _rest(layer, hidden, query, key, value, visible)
        normed_hidden: Tensor = expert.norm(hidden)
        return normed_hidden

    def blocks(self) -> tuple[nn.Module, ...]:
        """What may be run twice: the vision tower's blocks and the decoders' perceptrons."""
        decoders: Any = (*self._vlm.text_model.layers, *self.vlm_with_expert.lm_expert.layers)  # type: ignore[misc,union-attr]
        return (*self._vlm.vision_model.encoder.layers, *(layer.mlp for layer in decoders))

    def groups(self) -> dict[str, list[str]]:
        """The parameter names of each group."""
        return by_prefix(self, GROUP_OF_MODULE)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def _vlm(self) -> Any:
        return self.vlm_with_expert.vlm.model  # type: ignore[union-attr]

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, heads * head_dim] -> [N, heads, L, head_dim]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


def _rest(layer: Any, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """A decoder layer from its queries, keys and values on."""
    grouped = query.shape[1] > key.shape[1]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of [N, heads, L, head_dim] at `positions` [N, L], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    share = torch.arange(first.shape[-1], dtype=torch.float32, device=x.device) / first.shape[-1]
    angle = positions[:, None, :, None].float() / WAVELENGTH**share
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _sines(time: Tensor, width: int) -> Tensor:
    """`width` sines and cosines of `time` [N] with periods from `SHORTEST` to `LONGEST`, float64 [N, width]."""
    share = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    angle = 2 * math.pi * time[:, None] / (SHORTEST * (LONGEST / SHORTEST) ** share)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _smolvlm(config: SmolVLAConfig) -> SmolVLMConfig:
    vision = config.vision
    return SmolVLMConfig(
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "patch_size": vision.patch_size,
            "image_size": config.image_size,
        },
        text_config=_llama(config.language, config.vocab_size).to_dict(),
        scale_factor=config.shuffle,
        image_token_id=config.vocab_size - 1,
    )


def _expert(config: SmolVLAConfig) -> LlamaModel:
    """The action expert; between layers of its own keys it reads those of the language model."""
    expert = LlamaModel(_llama(config.expert, 1))
    del expert.embed_tokens  # it never reads a token
    width = config.language.key_value_heads * config.language.head_dim
    for number, layer in enumerate(expert.layers):
        if number % config.self_attention_every:
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, nn.Linear(width, width, bias=False))
    return expert


def _llama(sizes: Transformer, words: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.mlp_width,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        initializer_range=sizes.initializer_range,
        rms_norm_eps=1e-5,
        pad_token_id=None,
    )
