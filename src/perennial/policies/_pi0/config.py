"""The sizes, statistics and sampling of a pi-0 checkpoint: everything its config.json says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each dimension of the training data, in environment units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Vision:
    """The SigLIP tower; defaults are those of PaliGemma 3B at 224 pixels."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp_width: int = 4304
    patch_size: int = 14


@dataclass(frozen=True)
class Transformer:
    """A Gemma decoder; the expert has as many layers and the same heads as the language model.

    Attributes:
        initializer_range: standard deviation of random weights.
    """

    width: int
    layers: int
    mlp_width: int
    heads: int = 8
    key_value_heads: int = 1
    head_dim: int = 256
    initializer_range: float = 0.02


GEMMA: dict[str, Transformer] = {
    "gemma_2b": Transformer(width=2048, layers=18, mlp_width=16384),
    "gemma_300m": Transformer(width=1024, layers=18, mlp_width=4096),
}
"""The published decoders by their published names."""


@dataclass(frozen=True)
class Exploration:
    """How actions are sampled above temperature 0, see `_flow.sde` and `_pi0.noise`.

    Attributes:
        steps: "one" makes one denoising step of each decision, drawn evenly, stochastic; "all" makes every step so.
        level: noise level a of Flow-SDE at temperature 1, above 0; the temperature multiplies it.
        method: "sde" is Flow-SDE; "noise" is Flow-Noise, where a network learns the deviations of every step.
        lowest, highest: bounds of Flow-Noise's deviations at temperature 1; the temperature multiplies them.
    """

    steps: Literal["one", "all"] = "one"
    level: float = 0.5
    method: Literal["sde", "noise"] = "sde"
    lowest: float = 0.08
    highest: float = 0.16

    def __post_init__(self) -> None:
        if self.steps not in ("one", "all"):
            raise ValueError(f"exploration.steps is {self.steps!r}, not 'one' or 'all'")
        if not self.level > 0:
            raise ValueError(f"exploration.level is {self.level}, not above 0")
        if self.method not in ("sde", "noise"):
            raise ValueError(f"exploration.method is {self.method!r}, not 'sde' or 'noise'")
        if self.method == "noise" and self.steps != "all":
            raise ValueError(f"exploration.steps is {self.steps!r}, but the method 'noise' needs 'all'")
        if not 0 < self.lowest < self.highest:
            raise ValueError(f"exploration.lowest and highest are {self.lowest} and {self.highest}, not 0 < low < high")

    def passes(self, denoising_steps: int) -> int:
        """Stochastic steps of one decision, each of which the update looks at."""
        return 1 if self.steps == "one" else denoising_steps


@dataclass(frozen=True)
class PI0Config:
    """One pi-0 model, of any size; defaults are those of the published `pi0_base`.

    Attributes:
        state, action: statistics that map data to zero mean and unit deviation; their lengths are S and D.
        bos_token_id: begins every prompt.
        vocab_size: rows of the token embedding.
        image_size: of the square input in pixels.
        camera_size: side of the pictures that cameras take, which are then resized; None takes `image_size`.
        views: most camera images per observation. An absent camera is left out, which equals masking it.
        horizon: H, actions that are predicted; `executed`: C, how many of them are carried out.
        max_state_dim, max_action_dim: widths to which states and actions are padded with zeros.
        denoising_steps: Euler steps from noise to actions.
        max_prompt_length: longest prompt in tokens.
    """

    state: Moments
    action: Moments
    bos_token_id: int = 2
    vocab_size: int = 257152
    vision: Vision = Vision()
    language: Transformer = GEMMA["gemma_2b"]
    expert: Transformer = GEMMA["gemma_300m"]
    image_size: int = 224
    camera_size: int | None = None
    views: int = 3
    horizon: int = 50
    executed: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    denoising_steps: int = 10
    max_prompt_length: int = 48
    exploration: Exploration = Exploration()

    def __post_init__(self) -> None:
        shared = ("layers", "heads", "key_value_heads", "head_dim")
        if any(getattr(self.language, name) != getattr(self.expert, name) for name in shared):
            raise ValueError(f"language and expert differ in one of {', '.join(shared)}")
        if not 1 <= self.executed <= self.horizon:
            raise ValueError(f"executed is {self.executed}, not between 1 and the horizon {self.horizon}")
        if self.action_dim > self.max_action_dim or len(self.state.mean) > self.max_state_dim:
            raise ValueError("the statistics have more dimensions than max_action_dim or max_state_dim")

    @property
    def action_dim(self) -> int:
        """D, numbers per action."""
        return len(self.action.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown or out of range.
        """
        parts: dict[str, Any] = {
            "vision": Vision(**values["vision"]),
            "language": Transformer(**values["language"]),
            "expert": Transformer(**values["expert"]),
            "exploration": Exploration(**values["exploration"]),
        }
        for name in ("state", "action"):
            parts[name] = Moments(tuple(values[name]["mean"]), tuple(values[name]["std"]))
        return cls(**{**values, **parts})


SMALL: dict[str, Any] = {
    "image_size": 64,
    "views": 1,
    "horizon": 16,
    "executed": 16,
    "denoising_steps": 5,
    "max_prompt_length": 24,
}
"""What the small defaults of flow policies have in common."""


def small_config(words: int, bos_token_id: int, state: Moments, action: Moments, **changes: Any) -> PI0Config:
    """The same architecture at 1/3000 of its size, for one CPU thread.

    Args:
        words: size of the tokenizer's vocabulary.
        bos_token_id: the tokenizer's id of the beginning of a sequence.
        state: statistics of the demonstrations' states.
        action: statistics of the demonstrations' actions.
        changes: fields that differ from the default.
    """
    heads = {"layers": 3, "heads": 4, "key_value_heads": 2, "head_dim": 32, "initializer_range": 0.05}
    default = PI0Config(
        state=state,
        action=action,
        bos_token_id=bos_token_id,
        vocab_size=words,
        vision=Vision(width=96, layers=2, heads=3, mlp_width=384, patch_size=16),
        language=Transformer(width=160, mlp_width=384, **heads),  # type: ignore[arg-type]
        expert=Transformer(width=128, mlp_width=384, **heads),  # type: ignore[arg-type]
        max_state_dim=len(state.mean),
        max_action_dim=len(action.mean),
        **SMALL,
    )
    return dataclasses.replace(default, **changes)
