"""The sizes and statistics of an OpenVLA-OFT checkpoint: everything its config.json says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Quantiles:
    """Per-dimension statistics that map data to [-1, 1] and back.

    Attributes:
        q01, q99: the 1st and 99th percentile of each dimension, mapped to -1 and 1.
        mask: False for a dimension that is already in [-1, 1] and stays as it is (a gripper); empty for none.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...] = ()


@dataclass(frozen=True)
class NormStats:
    """Statistics of the data that the checkpoint was trained on."""

    action: Quantiles
    proprio: Quantiles | None = None


@dataclass(frozen=True)
class Tower:
    """A vision transformer.

    Attributes:
        layers: blocks that are computed. Features are read before the last block of the published towers, so this is
            one fewer than they have.
        registers: register tokens (DINOv2 only).
        mean, std: image normalisation by colour channel.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    registers: int = 0


@dataclass(frozen=True)
class Language:
    """A Llama decoder."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class OpenVLAOFTConfig:
    """One OpenVLA-OFT model, of any size.

    Attributes:
        image_size, patch_size: of the square input of both towers, in pixels.
        views: camera images per observation.
        center_crop: look only at the central 90 % of the image's area, as trained with random crops.
        camera_size: side of the pictures that cameras take, which are then resized; None takes `image_size`.
        projector_width: hidden width of the first projector layer; the published model has 4 x the fused feature width.
        vocab_size: ids below it are valid tokens; the last `action_bins` of them stand for actions.
        embedding_rows: rows of the token embedding, `vocab_size` plus padding.
        action_bins: edges of the bins on [-1, 1]; there is one centre fewer.
        chunk: actions per decision; `hold`: environment steps for which each of them is held.
        max_prompt_length: longest prompt in tokens.
        use_proprio: a token made from the normalised state follows the patches.
        prompt_end: the prompt stops at its last colon and ends in these tokens; None keeps the blank after the colon.
        stop_token_id: follows the action slots; None ends the sequence with them.
        gripper: "libero" turns the last number of an action, 0 closed to 1 open, into -1 open or 1 closed.
        regression: a perceptron reads the numbers of each action from the hidden states of its slots, not tokens.
    """

    image_size: int
    patch_size: int
    dino: Tower
    siglip: Tower
    projector_width: int
    language: Language
    vocab_size: int
    embedding_rows: int
    action_bins: int
    chunk: int
    hold: int
    norm_stats: NormStats
    use_proprio: bool
    bos_token_id: int
    views: int = 1
    center_crop: bool = False
    camera_size: int | None = None
    max_prompt_length: int = 128
    prompt_end: tuple[int, ...] | None = None
    stop_token_id: int | None = None
    gripper: Literal["unchanged", "libero"] = "unchanged"
    regression: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.dino.mlp_width % self.dino.width:
            raise ValueError(f"dino.mlp_width {self.dino.mlp_width} is not a multiple of its width {self.dino.width}")
        if self.use_proprio and self.norm_stats.proprio is None:
            raise ValueError("use_proprio needs norm_stats.proprio")

    @property
    def action_dim(self) -> int:
        """D, numbers per action."""
        return len(self.norm_stats.action.q01)

    @property
    def state_dim(self) -> int:
        """S, numbers of proprioception, 0 where it is not used."""
        stats = self.norm_stats.proprio
        return len(stats.q01) if self.use_proprio and stats is not None else 0

    @property
    def tokens(self) -> int:
        """K, action tokens per decision."""
        return self.chunk * self.action_dim

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OpenVLAOFTConfig:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        stats = values["norm_stats"]
        proprio = stats.get("proprio")
        parts = {
            "dino": read(Tower, values["dino"]),
            "siglip": read(Tower, values["siglip"]),
            "language": Language(**values["language"]),
            "norm_stats": NormStats(read(Quantiles, stats["action"]), proprio and read(Quantiles, proprio)),
        }
        config: OpenVLAOFTConfig = read(cls, {**values, **parts})
        return config


def read(kind: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass `kind` with these fields, lists of JSON as tuples."""
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


IMAGENET_MEAN, IMAGENET_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
HALF = (0.5, 0.5, 0.5)


def small_config(words: int, bos_token_id: int, norm_stats: NormStats, **changes: Any) -> OpenVLAOFTConfig:
    """The embedded default: the published architecture at 1/4000 of its size, for one CPU thread.

    Args:
        words: size of the tokenizer's vocabulary; the action tokens come after it.
        bos_token_id: the tokenizer's id of the beginning of a sequence.
        norm_stats: statistics of the demonstrations; proprioception is used if it has some.
        changes: fields that differ from the default.
    """
    bins = int(changes.get("action_bins", 64))
    default = OpenVLAOFTConfig(
        image_size=64,
        patch_size=16,
        dino=Tower(width=96, layers=2, heads=3, mlp_width=384, mean=IMAGENET_MEAN, std=IMAGENET_STD, registers=2),
        siglip=Tower(width=96, layers=2, heads=3, mlp_width=384, mean=HALF, std=HALF),
        projector_width=384,
        language=Language(width=160, layers=3, heads=5, key_value_heads=5, mlp_width=384, initializer_range=0.05),
        vocab_size=words + bins,
        embedding_rows=words + bins,
        action_bins=bins,
        chunk=2,
        hold=8,
        norm_stats=norm_stats,
        use_proprio=norm_stats.proprio is not None,
        bos_token_id=bos_token_id,
        max_prompt_length=24,
    )
    return dataclasses.replace(default, **changes)
