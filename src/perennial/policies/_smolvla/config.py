"""The sizes of a SmolVLA checkpoint, and reading LeRobot's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perennial.policies._pi0.checkpoint import read_layouts, shared_fields
from perennial.policies._pi0.config import SMALL, Moments, PI0Config, Transformer, Vision

UNUSED = r"lm_head\.weight$|^(un)?normalize_"
"""Tensors of published files that nothing reads: word heads and old normalisers."""


VISION = Vision(width=768, layers=12, heads=12, mlp_width=3072, patch_size=16)
LANGUAGE = Transformer(width=960, layers=16, mlp_width=2560, heads=15, key_value_heads=5, head_dim=64)
EXPERT = Transformer(width=720, layers=16, mlp_width=2048, heads=15, key_value_heads=5, head_dim=64)


@dataclass(frozen=True)
class SmolVLAConfig(PI0Config):
    """One SmolVLA model, of any size; defaults are those of the published `smolvla_base`, on SmolVLM2-500M.

    Attributes:
        shuffle: side of the square of patches that become one image token.
        self_attention_every: the expert attends to actions in the first of so many layers, to the prefix in all.
    """

    vocab_size: int = 49280
    vision: Vision = VISION
    language: Transformer = LANGUAGE
    expert: Transformer = EXPERT
    image_size: int = 512
    shuffle: int = 4
    self_attention_every: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exploration.method != "sde":
            raise ValueError(f"exploration.method is {self.exploration.method!r}, but only 'sde' is known")


def small_config(words: int, state: Moments, action: Moments, **changes: Any) -> SmolVLAConfig:
    """The same architecture, small enough for one CPU thread.

    Args:
        words: size of the tokenizer's vocabulary.
        state: statistics of the demonstrations' states.
        action: statistics of the demonstrations' actions.
        changes: fields that differ from the default.
    """
    heads = {"layers": 4, "heads": 4, "key_value_heads": 2, "head_dim": 32, "initializer_range": 0.05}
    default = SmolVLAConfig(
        state=state,
        action=action,
        vocab_size=words,
        vision=Vision(width=96, layers=2, heads=3, mlp_width=384, patch_size=8),
        language=Transformer(width=160, mlp_width=384, **heads),  # type: ignore[arg-type]
        expert=Transformer(width=120, mlp_width=256, **heads),  # type: ignore[arg-type]
        max_state_dim=len(state.mean),
        max_action_dim=len(action.mean),
        shuffle=2,
        **SMALL,
    )
    return replace(default, **changes)


def read_config(folder: Path) -> SmolVLAConfig:
    """The configuration of a checkpoint, ours or in the layout of LeRobot's `smolvla_base`; see `read_layouts`."""
    return read_layouts(folder, "smolvla", SmolVLAConfig, _from_lerobot)


def _from_lerobot(values: Mapping[str, Any], state: Moments, action: Moments) -> SmolVLAConfig:
    default = SmolVLAConfig(state, action)
    scaling = values["normalization_mapping"]
    wide, layers = default.language.width, values["num_vlm_layers"]
    wanted = {
        "normalization_mapping": ({scaling["STATE"], scaling["ACTION"]}, {"MEAN_STD"}),
        "attention_mode": (values["attention_mode"], "cross_attn"),
        "num_expert_layers": (max(values["num_expert_layers"], 0) or layers, layers),
        "add_image_special_tokens": (values["add_image_special_tokens"], False),
        "SmolVLM2-500M in vlm_model_name": ("SmolVLM2-500M" in values["vlm_model_name"], True),
    }
    for name, (found, known) in wanted.items():
        if found != known:
            raise ValueError(f"{name} is {found!r}, but only {known!r} is known")
    narrow = int(wide * values["expert_width_multiplier"])
    return replace(
        default,
        language=replace(default.language, layers=layers),
        expert=replace(default.expert, width=narrow, layers=layers, mlp_width=_perceptron(narrow)),
        image_size=values["resize_imgs_with_padding"][0],
        denoising_steps=values["num_steps"],
        self_attention_every=values["self_attn_every_n_layers"],
        **shared_fields(values),
    )


def _perceptron(width: int) -> int:
    """LeRobot's width of the expert's perceptron: 8/3 of its own, rounded up to a multiple of 256."""
    return 256 * -(-int(4 * int(2 * width / 3)) // 256)
