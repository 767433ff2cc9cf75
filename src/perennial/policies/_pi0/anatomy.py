"""The anatomy of pi-0, from a config or of the published size."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from perennial.policies._anatomy import Anatomy, Blocks, Layer, Visit
from perennial.policies._pi0 import checkpoint as pi0_checkpoint
from perennial.policies._pi0.config import Moments, PI0Config, Transformer
from perennial.policies._pi0.noise import HIDDEN

TOKENS_PER_WORD = 1.4
"""Of large tokenizers, roughly."""


def published_config() -> PI0Config:
    """The 3B model of LeRobot's `pi0_base` as LIBERO uses it: two views, 5 of 50 actions carried out."""
    state, action = (Moments((0.0,) * width, (1.0,) * width) for width in (8, 7))
    return PI0Config(state=state, action=action, views=2, executed=5)


def read(folder: Path | None, instruction: str) -> Anatomy:
    """The anatomy of the checkpoint in `folder`, of which only the config is read; None takes the published size."""
    config = published_config() if folder is None else pi0_checkpoint.read_config(folder)
    return describe(config, 1 + prompt_tokens(config, instruction), "float32")


def prompt_tokens(config: PI0Config, instruction: str) -> int:
    """Tokens of an instruction and a newline, guessed from its words."""
    words = len(instruction.split()) * (TOKENS_PER_WORD if config.vocab_size > 10_000 else 1)
    return 1 + math.ceil(words)


def describe(config: PI0Config, prompt: int, dtype: str) -> Anatomy:
    """The anatomy of `config` with prompts of `prompt` tokens, BOS included."""
    vision, language, expert = config.vision, config.language, config.expert
    patches, views = (config.image_size // vision.patch_size) ** 2, config.views
    before, after, steps = views * patches + prompt, 1 + config.horizon, config.denoising_steps
    stochastic = config.exploration.passes(steps)
    seen = Visit(views * patches)
    prefix, keys_only = (Visit(before, before),), (Visit(0, 0, added=before, unread=before),)
    acting = (Visit(after, before + after, times=steps),)
    learning = (Visit(after, before + after, times=stochastic),)

    def layer(into: int, out: int, positions: int, activated: bool = False) -> Layer:
        visits = Visit(positions, times=steps), Visit(positions, times=stochastic)
        return Layer("action", into, out, *visits, activated=activated)

    width = expert.width
    parts: tuple[Layer | Blocks, ...] = (
        *tower(config),
        Layer("vision", vision.width, language.width, seen, seen),
        Blocks("language", language.layers - 1, *sizes(language), prefix, prefix, gemma=True, attends_once=True),
        Blocks("language", 1, *sizes(language), prefix, keys_only, gemma=True, attends_once=True),
        layer(config.max_state_dim, width, 1),
        layer(config.max_action_dim, width, config.horizon),
        layer(2 * width, width, config.horizon, activated=True),
        layer(width, width, config.horizon),
        Blocks("action", expert.layers, *sizes(expert), acting, learning, gemma=True, attends_once=True, normed=True),
        layer(width, config.max_action_dim, config.horizon),
    )
    if config.exploration.method == "noise":
        ends = itertools.pairwise((width, *HIDDEN, config.max_action_dim))
        parts += tuple(layer(into, out, config.horizon, activated=True) for into, out in ends)
    other = {
        "vision": (patches + 2) * vision.width,
        "language": (config.vocab_size + 1) * language.width,
        "action": width,
    }
    return Anatomy(parts, other, config.executed, dtype, len(config.state.mean), config.action_dim)


def tower(config: PI0Config) -> tuple[Layer, Blocks]:
    """Patches and blocks of a SigLIP tower."""
    vision, views = config.vision, config.views
    patches = (config.image_size // vision.patch_size) ** 2
    seen, image = Visit(views * patches), (Visit(patches, patches, times=views),)
    heads = vision.heads, vision.heads, vision.width // vision.heads
    return (
        Layer("vision", 3 * vision.patch_size**2, vision.width, seen, seen, frozen=True),
        Blocks("vision", vision.layers, vision.width, *heads, vision.mlp_width, image, image, gated=False, normed=True),
    )


def sizes(of: Transformer) -> tuple[int, int, int, int, int]:
    """The sizes of a decoder in the order of those of `Blocks`."""
    return of.width, of.heads, of.key_value_heads, of.head_dim, of.mlp_width
