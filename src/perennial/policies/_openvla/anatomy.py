"""The anatomy of OpenVLA and OpenVLA-OFT, from a config or of the published size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from perennial.policies import _tokenizer
from perennial.policies._anatomy import Anatomy, Blocks, Layer, Visit
from perennial.policies._openvla import published as openvla_published
from perennial.policies._openvla.config import Language, NormStats, OpenVLAOFTConfig, Quantiles, Tower
from perennial.policies._openvla.regression import BLOCKS
from perennial.policies._openvla.settings import TOWERS, read_config, read_settings

TOKENS_PER_WORD = 1.4
"""Of Llama's tokenizer, where there is none to ask."""


def published_config(chunk: int) -> OpenVLAOFTConfig:
    """The 7B model of `openvla/openvla-7b`, as its config.json says."""
    towers = next(iter(TOWERS.values()))
    return OpenVLAOFTConfig(
        image_size=224,
        patch_size=towers.patch_size,
        dino=towers.dino,
        siglip=towers.siglip,
        projector_width=4 * (towers.dino.width + towers.siglip.width),
        language=Language(width=4096, layers=32, heads=32, key_value_heads=32, mlp_width=11008),
        vocab_size=32000,
        embedding_rows=32064,
        action_bins=256,
        chunk=chunk,
        hold=1,
        norm_stats=NormStats(Quantiles((-1.0,) * 7, (1.0,) * 7)),
        use_proprio=False,
        bos_token_id=1,
        prompt_end=(29871,),
    )


def read(folder: Path | None, chunk: int, instruction: str, one_by_one: bool, regression: bool = False) -> Anatomy:
    """The anatomy of the checkpoint in `folder`, of which only the config and the tokenizer are read.

    Args:
        folder: None takes the published size.
        chunk: actions per decision where the checkpoint leaves it open.
        instruction: whose prompt the network reads.
        one_by_one: tokens are decided one after another (OpenVLA), not all at once (OpenVLA-OFT).
        regression: a head of its own reads the actions, not the language model's.
    """
    if folder is None:
        config, dtype = published_config(chunk), "float32"
    elif openvla_published.is_published(folder):
        settings = read_settings(folder)
        config, dtype = read_config(folder, settings, chunk, empty_token_id=0), settings.dtype
    else:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, dtype = OpenVLAOFTConfig.from_json(values["openvla_oft"]), "float32"
    config = replace(config, regression=regression)
    return describe(config, prompt_tokens(folder, config, instruction), one_by_one, dtype)


def prompt_tokens(folder: Path | None, config: OpenVLAOFTConfig, instruction: str) -> int:
    """Tokens of the instruction's prompt behind BOS: counted by the tokenizer, or guessed from its words."""
    text = _tokenizer.prompt(instruction)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return math.ceil(TOKENS_PER_WORD * len(text.split()))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return len(tokenizer.encode(text.rstrip(), add_special_tokens=False).ids) + len(config.prompt_end or ())


def describe(config: OpenVLAOFTConfig, prompt: int, one_by_one: bool, dtype: str) -> Anatomy:
    """The anatomy of `config` with prompts of `prompt` tokens behind BOS."""
    language, width, tokens = config.language, config.language.width, config.tokens
    patches, views = (config.image_size // config.patch_size) ** 2, config.views
    before = 1 + views * patches + config.use_proprio + prompt
    seen, state, read = Visit(views * patches), Visit(1), Visit(tokens)
    parts: list[Layer | Blocks] = [
        *_tower(config, config.dino, 1 + config.dino.registers),
        *_tower(config, config.siglip, 0),
        Layer("vision", config.dino.width + config.siglip.width, config.projector_width, seen, seen, activated=True),
        Layer("vision", config.projector_width, width, seen, seen, activated=True),
        Layer("vision", width, width, seen, seen),
    ]
    if config.use_proprio:
        parts.append(Layer("action", config.state_dim, width, state, state, activated=True))
        parts.append(Layer("action", width, width, state, state))
    sizes = width, language.heads, language.key_value_heads, width // language.heads, language.mlp_width
    if one_by_one:
        acting = (Visit(before, before), Visit(1, before + tokens, times=tokens - 1))
        forced = (Visit(before + tokens - 1, before + tokens - 1),)
        parts.append(Blocks("language", language.layers, *sizes, acting, forced, normed=True))
    else:
        length = before + tokens + (config.stop_token_id is not None)
        whole, last = (Visit(length, length),), (Visit(tokens, length, added=length),)
        parts.append(Blocks("language", language.layers - 1, *sizes, whole, whole))
        parts.append(Blocks("language", 1, *sizes, last, last, recomputed=False, normed=True))
    other = {"vision": _positions(config), "language": (config.embedding_rows + 1) * width, "action": 0}
    if config.regression:
        each = Visit(config.chunk)
        sizes_of_head = ((config.action_dim * width, width), *(((width, width),) * BLOCKS), (width, config.action_dim))
        parts += [Layer("action", into, out, each, each, activated=out == width) for into, out in sizes_of_head]
        norms = 2 * width * (config.action_dim + BLOCKS + 1)
        other["action"] = config.action_bins * width + norms
    else:
        parts.append(Layer("action", width, config.action_bins, read, read, bias=False))
    dims = config.state_dim or None, config.action_dim
    return Anatomy(tuple(parts), other, config.chunk * config.hold, dtype, *dims)


def _positions(config: OpenVLAOFTConfig) -> int:
    """Numbers in the towers' position embeddings and class and register tokens."""
    patches = (config.image_size // config.patch_size) ** 2
    return patches * config.siglip.width + (patches + 2 + config.dino.registers) * config.dino.width


def _tower(config: OpenVLAOFTConfig, tower: Tower, extra: int) -> tuple[Layer, Blocks]:
    """Patches and blocks of a vision tower, in which `extra` tokens beside the patches take part."""
    patches = (config.image_size // config.patch_size) ** 2
    seen = Visit(patches * config.views)
    visits = (Visit(patches + extra, patches + extra, times=config.views),)
    heads = tower.heads, tower.heads, tower.width // tower.heads
    return (
        Layer("vision", 3 * config.patch_size**2, tower.width, seen, seen, frozen=True),
        Blocks(
            "vision", tower.layers, tower.width, *heads, tower.mlp_width, visits, visits, gated=False, scaled=extra > 0
        ),
    )
