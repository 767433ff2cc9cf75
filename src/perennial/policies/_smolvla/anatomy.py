"""The anatomy of SmolVLA, from a config or of the published size."""

from __future__ import annotations

from pathlib import Path

from perennial.policies._anatomy import Anatomy, Blocks, Layer, Visit
from perennial.policies._pi0.anatomy import prompt_tokens, sizes, tower
from perennial.policies._pi0.config import Moments
from perennial.policies._smolvla import config as smolvla_config
from perennial.policies._smolvla.config import SmolVLAConfig


def published_config() -> SmolVLAConfig:
    """LeRobot's `smolvla_base`: three views, six joints, all 50 actions carried out."""
    joints = Moments((0.0,) * 6, (1.0,) * 6)
    return SmolVLAConfig(state=joints, action=joints)


def read(folder: Path | None, instruction: str) -> Anatomy:
    """The anatomy of the checkpoint in `folder`, of which only the config is read; None takes the published size."""
    config = published_config() if folder is None else smolvla_config.read_config(folder)
    return describe(config, prompt_tokens(config, instruction), "float32")


def describe(config: SmolVLAConfig, prompt: int, dtype: str) -> Anatomy:
    """The anatomy of `config` with prompts of `prompt` tokens."""
    vision, language, expert = config.vision, config.language, config.expert
    patches = (config.image_size // vision.patch_size) ** 2
    shown = config.views * patches // config.shuffle**2
    before, horizon, steps = shown + prompt + 1, config.horizon, config.denoising_steps
    stochastic = config.exploration.passes(steps)
    image, state = Visit(shown), Visit(1)
    prefix, keys_only = (Visit(before, before),), (Visit(0, added=before),)
    wide, width = language.width, expert.width

    def layer(into: int, out: int, activated: bool = False) -> Layer:
        visits = Visit(horizon, times=steps), Visit(horizon, times=stochastic)
        return Layer("action", into, out, *visits, activated=activated)

    def decoder(layers: int, keys: int, added: int, keys_from: int | None = None) -> Blocks:
        acting = (Visit(horizon, keys, added, times=steps),)
        learning = (Visit(horizon, keys, added, times=stochastic),)
        return Blocks("action", layers, *sizes(expert), acting, learning, attends_once=True, keys_from=keys_from)

    joint = -(-expert.layers // config.self_attention_every)
    parts: tuple[Layer | Blocks, ...] = (
        *tower(config),
        Layer("vision", vision.width * config.shuffle**2, wide, image, image, bias=False),
        Layer("action", config.max_state_dim, wide, state, state),
        Blocks("language", language.layers - 1, *sizes(language), prefix, prefix, attends_once=True),
        Blocks("language", 1, *sizes(language), keys_only, keys_only, attends_once=True),
        layer(config.max_action_dim, width),
        layer(2 * width, width, activated=True),
        layer(width, width),
        decoder(joint, before + horizon, horizon),
        decoder(expert.layers - joint, before, before, language.key_value_heads * language.head_dim),
        layer(width, config.max_action_dim),
    )
    other = {
        "vision": (patches + 2) * vision.width,
        "language": (config.vocab_size + 1) * wide,
        "action": width,
    }
    return Anatomy(parts, other, config.executed, dtype, len(config.state.mean), config.action_dim)
