"""The network of pi-0 (Black et al., arXiv 2410.24164), transformers' own, in two passes.

The first pass runs PaliGemma over images and prompt and keeps its keys and values; the second runs the action expert,
which attends to them, over the state and the noisy actions. Only the second is repeated for each denoising step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration
from transformers.initialization import no_init_weights

from perennial.policies._groups import by_prefix
from perennial.policies._pi0.config import PI0Config, Transformer
from perennial.policies._pi0.noise import PREFIX, NoiseNetwork

GROUP_OF_MODULE = {
    "pi0.model.vlm.vision_tower.": "vision",
    "pi0.model.vlm.multi_modal_projector.": "vision",
    "pi0.model.vlm.language_model.": "language",
    "pi0.model.dit.": "action",
    "pi0.embed_action_time.": "action",
    "pi0.action_out_proj.": "action",
    PREFIX: "action",
}


@dataclass(frozen=True)
class Prefix:
    """What the expert attends to of images and prompt: keys and values, and which of their columns are no padding."""

    cache: Any
    mask: Tensor


class PI0Network(nn.Module):
    """Images, prompt, state and noisy actions in, velocity out.

    Transformers' network is a child, so that PEFT does not rename adapter weights by the table for published files.
    """

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        self.pi0: Any = PI0ForConditionalGeneration(_transformers_config(config))
        self.pi0.model.dit.embed_tokens = None  # the expert never reads a token
        self.noise_network = NoiseNetwork(config) if config.exploration.method == "noise" else None

    @classmethod
    def create(cls, config: PI0Config, random: bool) -> PI0Network:
        """The network in float32, with weights from torch's generator or with none that mean anything."""
        if not random:
            with no_init_weights():
                return cls(config)
        network = cls(config)
        # Gemma's scale is made for its own width; these layers read a handful of numbers.
        for module in (*network.pi0.embed_action_time.children(), network.pi0.action_out_proj):
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        return network

    def prefix(self, pixels: Tensor, prompt: Tensor, mask: Tensor) -> Prefix:
        """The first pass.

        Args:
            pixels: [N, V, 3, H, W] in [-1, 1].
            prompt: token ids [N, P], padded on the right.
            mask: bool [N, P], False at padding.
        """
        vlm, rows = self.pi0.model.vlm, len(prompt)
        patches = vlm.get_image_features(pixels.to(self.dtype).flatten(0, 1)).pooler_output
        patches = patches.reshape(rows, -1, patches.shape[-1])
        embedded = torch.cat([patches, vlm.get_input_embeddings()(prompt)], dim=1)
        columns = torch.cat([mask.new_ones(rows, patches.shape[1]), mask], dim=1).long()
        cache = vlm(
            inputs_embeds=embedded,
            attention_mask=columns,
            position_ids=columns.cumsum(1) - 1,
            token_type_ids=torch.zeros_like(columns),
            use_cache=True,
        ).past_key_values
        return Prefix(cache, columns)

    def velocity(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The second pass: velocity float32 [N, H, P] of noisy actions; arguments as of `hidden`."""
        return self.read_velocity(self.hidden(prefix, state, noisy, time))

    def read_velocity(self, hidden: Tensor) -> Tensor:
        """Velocity float32 [N, H, P] from the expert's hidden states."""
        velocity: Tensor = self.pi0.action_out_proj(hidden).float()
        return velocity

    def hidden(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The expert's hidden states at the actions, [N, H, width].

        Args:
            prefix: what `prefix` gave; it stays as it is.
            state: normalised and padded, [N, max_state_dim].
            noisy: [N, H, P], noise at time 1 and actions at time 0.
            time: float32 [N].
        """
        embedded = self.pi0.embed_action_time(state.to(self.dtype), noisy.to(self.dtype), time)
        out = self.pi0.model(action_embeds=embedded, attention_mask=prefix.mask, past_key_values=prefix.cache)
        prefix.cache.crop(-(1 + noisy.shape[1]))  # the columns of the state and of the actions
        hidden: Tensor = out.last_hidden_state[:, -noisy.shape[1] :]
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def groups(self) -> dict[str, list[str]]:
        """The parameter names of each group."""
        return by_prefix(self, GROUP_OF_MODULE)


def _transformers_config(config: PI0Config) -> transformers.PI0Config:
    vision = config.vision
    return transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": _gemma(config.language) | {"vocab_size": config.vocab_size},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": vision.width,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "intermediate_size": vision.mlp_width,
                "patch_size": vision.patch_size,
                "image_size": config.image_size,
                "vision_use_head": False,
            },
            "projection_dim": config.language.width,
            "image_token_id": config.vocab_size,
        },
        dit_config=_gemma(config.expert),
        chunk_size=config.horizon,
        max_state_dim=config.max_state_dim,
        max_action_dim=config.max_action_dim,
    )


def _gemma(sizes: Transformer) -> dict[str, object]:
    return {
        "model_type": "gemma",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.mlp_width,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_dim,
        "initializer_range": sizes.initializer_range,
    }
