"""The plain way: transformers' networks put together and wrapped by PEFT, computing all that they offer.

The same sizes as OpenVLA-OFT, but every block of the towers, every position of the last decoder layer, the whole
vocabulary, and one micro-batch size that is known to fit. Nothing is shared with the project's own network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from perennial.policies._openvla.config import OpenVLAOFTConfig


class PlainVLA(nn.Module):
    """Images and prompt in, logits of the whole vocabulary at the action slots out."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        shared = {"image_size": config.image_size, "patch_size": config.patch_size}
        self.dino = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                **shared,
                hidden_size=config.dino.width,
                num_hidden_layers=config.dino.layers + 1,
                num_attention_heads=config.dino.heads,
                mlp_ratio=config.dino.mlp_width // config.dino.width,
                num_register_tokens=config.dino.registers,
            )
        )
        self.siglip = SiglipVisionModel(
            SiglipVisionConfig(
                **shared,
                hidden_size=config.siglip.width,
                num_hidden_layers=config.siglip.layers + 1,
                num_attention_heads=config.siglip.heads,
                intermediate_size=config.siglip.mlp_width,
                vision_use_head=False,
            )
        )
        fused, width, language = config.dino.width + config.siglip.width, config.language.width, config.language
        self.projector = nn.Sequential(
            nn.Linear(fused, config.projector_width),
            nn.GELU(),
            nn.Linear(config.projector_width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.embedding_rows,
                hidden_size=width,
                intermediate_size=language.mlp_width,
                num_hidden_layers=language.layers,
                num_attention_heads=language.heads,
                num_key_value_heads=language.key_value_heads,
            )
        )
        self.tokens, self.registers = config.tokens, config.dino.registers

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """Logits [N, K, vocabulary] for `pixels` [N, 3, H, W] and `prompt` [N, P]."""
        dino = self.dino(pixels).last_hidden_state[:, 1 + self.registers :]
        seen = self.projector(torch.cat([dino, self.siglip(pixels).last_hidden_state], dim=-1))
        words = self.llama.get_input_embeddings()(prompt)
        slots = words.new_zeros(len(words), self.tokens, words.shape[2])
        sequence = torch.cat([words[:, :1], seen, words[:, 1:], slots], dim=1)
        both_ways = sequence.new_zeros(len(sequence), 1, sequence.shape[1], sequence.shape[1])
        logits: Tensor = self.llama(inputs_embeds=sequence, attention_mask=both_ways, use_cache=False).logits
        return logits[:, -self.tokens - 1 : -1]


@dataclass
class Peer:
    """The plain network and its steps."""

    config: OpenVLAOFTConfig
    rank: int
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                plain = PlainVLA(self.config)
        finally:
            torch.set_default_dtype(torch.float32)
        plain.llama.gradient_checkpointing_enable()
        targets = "all-linear"
        self.model = get_peft_model(plain, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-5)

    @torch.no_grad()
    def act(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """Sampled tokens [N, K]."""
        self.model.eval()
        probabilities = self.model(pixels, prompt).float().softmax(-1)
        return torch.multinomial(probabilities.flatten(0, 1), 1).view(len(pixels), -1)

    def update(self, pixels: Tensor, prompt: Tensor, chosen: Tensor, micro_batch: int) -> None:
        """One step of AdamW that raises the probability of `chosen` tokens [N, K]."""
        self.model.train()
        self.optimizer.zero_grad()
        for start in range(0, len(pixels), micro_batch):
            rows = slice(start, start + micro_batch)
            log_probs = self.model(pixels[rows], prompt[rows]).float().log_softmax(-1)
            loss = -log_probs.gather(-1, chosen[rows, :, None]).sum() / len(pixels)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
