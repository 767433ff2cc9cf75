"""The network of OpenVLA-OFT (Kim et al., arXiv 2502.19645) with the discrete, parallel-decoding head.

SigLIP and DINOv2 features are fused and projected into the input of a Llama that attends in both directions; all
action tokens are read from one forward pass.

Not computed at all, because nothing depends on it: the towers' last block, norm and pooling head; the vocabulary
outside the action bins; and, in the last decoder layer, every position that no action token is read from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from perennial.policies._openvla.config import OpenVLAOFTConfig, Tower
from perennial.policies._openvla.regression import RegressionHead


class OpenVLAOFTModel(nn.Module):
    """Images, prompt and state in, hidden states out, from which `lm_head` reads the actions.

    Parameter names follow the published checkpoint's modules.
    """

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config)
        self.language_model = LlamaForCausalLM(_llama(config))
        # Only the rows of the action bins, in vocabulary order: no other token is ever predicted.
        self.language_model.lm_head = nn.Linear(config.language.width, config.action_bins, bias=False)
        nn.init.normal_(self.language_model.lm_head.weight, std=config.language.initializer_range)
        self.proprio_projector = ProprioProjector(config) if config.use_proprio else None
        self.action_head = RegressionHead(config) if config.regression else None
        self.tokens = config.tokens
        self.stop_token_id = config.stop_token_id

    def forward(self, pixels: Tensor, prompt: Tensor, prompt_mask: Tensor, state: Tensor) -> Tensor:
        """Final hidden states one position before each action slot, [N, K, width].

        Args:
            pixels: [N, V, 3, H, W] in [0, 1].
            prompt: token ids [N, 1 + P]: BOS, then the prompt, padded on the left, between the two.
            prompt_mask: bool [N, 1 + P], False at padding.
            state: normalised proprioception [N, S]; S is 0 where it is not used.
        """
        embeddings, mask = self.prefix(pixels, prompt, prompt_mask, state)
        slots = embeddings.new_zeros(len(embeddings), self.tokens, embeddings.shape[2])
        parts = [embeddings, slots]
        if self.stop_token_id is not None:
            stop = prompt.new_full((len(prompt), 1), self.stop_token_id)
            parts.append(self.language_model.model.embed_tokens(stop))
        sequence = torch.cat(parts, dim=1)
        return self._decode(sequence, functional.pad(mask, (0, sequence.shape[1] - mask.shape[1]), value=True))

    def prefix(self, pixels: Tensor, prompt: Tensor, prompt_mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model sees before the action slots: BOS, the image, the state, padding and the prompt.

        Returns:
            embeddings: [N, L, width].
            mask: bool [N, L], False at padding.
        """
        words = self.language_model.model.embed_tokens(prompt)
        parts = [words[:, :1], self.projector(self.vision_backbone(pixels))]
        if self.proprio_projector is not None:
            parts.append(self.proprio_projector(state)[:, None])
        sensed = torch.cat(parts, dim=1)
        mask = torch.cat([prompt_mask.new_ones(sensed.shape[:2]), prompt_mask[:, 1:]], dim=1)
        return torch.cat([sensed, words[:, 1:]], dim=1), mask

    def _decode(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Run the decoder with attention in both directions over the columns where `mask` [N, L] is True."""
        llama = self.language_model.model
        cos, sin = llama.rotary_emb(hidden, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        bias = None
        if not bool(mask.all()):
            bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
            bias = bias.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
            bias = bias.expand(-1, 1, mask.shape[1], -1)
        for layer in llama.layers[:-1]:
            hidden = layer(hidden, attention_mask=bias, position_embeddings=(cos, sin), is_causal=False)
        after = 1 if self.stop_token_id is None else 2
        read = slice(-self.tokens - after, -after)
        states: Tensor = llama.norm(_last_layer(llama.layers[-1], hidden, cos, sin, bias, read))
        return states


def _last_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, read: slice) -> Tensor:
    """A decoder layer evaluated only at the positions that are read, [N, tokens, width]."""
    attention = layer.self_attn

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)

    normed = layer.input_layernorm(hidden)
    query = _rotate(heads(attention.q_proj(normed[:, read])), cos[:, read], sin[:, read])
    key = _rotate(heads(attention.k_proj(normed)), cos, sin)
    value = heads(attention.v_proj(normed))
    mixed = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if bias is None else bias[:, :, read],
        enable_gqa=attention.num_key_value_groups > 1,
    )
    hidden = hidden[:, read] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [N, heads, L, head_dim] (Su et al., arXiv 2104.09864, in Llama's half layout)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class VisionBackbone(nn.Module):
    """Patch features of DINOv2 and SigLIP side by side, [N, V * patches, dino width + siglip width]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.featurizer = Dinov2WithRegistersModel(_dino(config))
        self.fused_featurizer = SiglipVisionModel(_siglip(config))
        self.featurizer.layernorm = nn.Identity()
        self.fused_featurizer.post_layernorm = nn.Identity()
        del self.featurizer.embeddings.mask_token
        self.first_patch = 1 + config.dino.registers
        for name in ("mean", "std"):
            both = torch.tensor([getattr(config.dino, name), getattr(config.siglip, name)], dtype=torch.float32)
            self.register_buffer(name, both[:, None, :, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of `pixels` [N, V, 3, H, W] in [0, 1]."""
        rows, views = pixels.shape[:2]
        normalised = (pixels.flatten(0, 1)[None] - self.mean) / self.std
        dino = self.featurizer.embeddings(normalised[0])
        for block in self.featurizer.encoder.layer:
            dino = block(dino)
        siglip = self.fused_featurizer.embeddings(normalised[1])
        for block in self.fused_featurizer.encoder.layers:
            siglip = block(siglip, attention_mask=None)
        fused = torch.cat([dino[:, self.first_patch :], siglip], dim=-1)
        return fused.reshape(rows, views * fused.shape[1], fused.shape[2])


class Projector(nn.Module):
    """Fused features to language-model embeddings: a three-layer GELU perceptron."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        width = config.language.width
        self.fc1 = nn.Linear(config.dino.width + config.siglip.width, config.projector_width)
        self.fc2 = nn.Linear(config.projector_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[..., fused width] -> [..., language width]."""
        out: Tensor = self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(features)))))
        return out


class ProprioProjector(nn.Module):
    """Normalised proprioception to one language-model embedding: a two-layer GELU perceptron."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.state_dim, config.language.width)
        self.fc2 = nn.Linear(config.language.width, config.language.width)

    def forward(self, state: Tensor) -> Tensor:
        """[N, S] -> [N, language width]."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(state)))
        return out


def _llama(config: OpenVLAOFTConfig) -> LlamaConfig:
    language = config.language
    return LlamaConfig(
        vocab_size=config.embedding_rows,
        hidden_size=language.width,
        intermediate_size=language.mlp_width,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.key_value_heads,
        head_dim=language.width // language.heads,
        initializer_range=language.initializer_range,
        rms_norm_eps=language.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def _dino(config: OpenVLAOFTConfig) -> Dinov2WithRegistersConfig:
    return Dinov2WithRegistersConfig(
        **_vision(config, config.dino),
        mlp_ratio=config.dino.mlp_width // config.dino.width,
        num_register_tokens=config.dino.registers,
    )


def _siglip(config: OpenVLAOFTConfig) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        **_vision(config, config.siglip), intermediate_size=config.siglip.mlp_width, vision_use_head=False
    )


def _vision(config: OpenVLAOFTConfig, tower: Tower) -> dict[str, object]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attn_implementation": "sdpa",
    }
