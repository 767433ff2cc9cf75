"""Which tensor of a published OpenVLA checkpoint is which parameter of ours.

The published towers are timm's, where query, key and value are one tensor; ours are those of transformers, where they
are three. DINOv2's published position embedding has no row for the class token; ours has one, which is zero. Of the
published language-model head we hold the rows of the action tokens. What nothing depends on (the last block, norm and
pooling head of the towers) has no parameter here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.policies._openvla.config import OpenVLAOFTConfig

DINO, SIGLIP = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
POSITIONS, CLASS_TOKEN = f"{DINO}pos_embed", f"{DINO}cls_token"
CLASS_POSITION = f"{DINO}embeddings.position_embeddings"
"""Our parameter whose first row is the class token's position."""
HEAD = "language_model.lm_head.weight"
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")

RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    DINO: (
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.register_tokens", "reg_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("encoder.layer.", "blocks."),
        ("attention.o_proj.", "attn.proj."),
        *((f"attention.{part}.", "attn.qkv.") for part in QUERY_KEY_VALUE),
        ("layer_scale1.lambda1", "ls1.scale_factor"),
        ("layer_scale2.lambda1", "ls2.scale_factor"),
    ),
    SIGLIP: (
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("encoder.layers.", "blocks."),
        ("self_attn.out_proj.", "attn.proj."),
        *((f"self_attn.{part}.", "attn.qkv.") for part in QUERY_KEY_VALUE),
        ("layer_norm", "norm"),
    ),
}
"""By module: what a parameter's name has here, and what it has in a published checkpoint."""

SIDE = ("proprio_projector", "action_head")
"""Modules that OpenVLA-OFT publishes in files of their own."""


@dataclass(frozen=True)
class Published:
    """One tensor of a published checkpoint.

    Attributes:
        shape: in the file.
        parts: our parameters, stacked along their first dimension; none where nothing depends on the tensor.
        first_row: where `parts` begin; other rows than theirs are not ours.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    first_row: int = 0


def published_name(ours: str) -> str:
    """The name that our parameter has in a published checkpoint."""
    for module, renamed in RENAMED.items():
        if ours.startswith(module):
            rest = ours.removeprefix(module)
            for here, there in renamed:
                rest = rest.replace(here, there)
            return module + rest
    return ours


def published_rows(ours: str, outputs: int, first_action_token: int) -> tuple[str, int | None]:
    """The published tensor that holds the weight of a linear layer of ours, and the layer's first row in it.

    Args:
        ours: name of the weight.
        outputs: rows of the weight.
        first_action_token: the row of the published word head where ours begins.

    Returns:
        The tensor's name, and the row; None where the tensor is the layer's alone.
    """
    name = published_name(ours)
    if name == HEAD:
        return name, first_action_token
    return name, _place(ours) * outputs if ".attn.qkv." in name else None


def key_map(config: OpenVLAOFTConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Published]:
    """Every tensor of the published checkpoint of this size, by its published name.

    Args:
        config: of the model.
        shapes: of our parameters, by name; those of `SIDE` are published elsewhere and left out.
    """
    parts: dict[str, list[str]] = {}
    for ours in shapes:
        if not ours.startswith(tuple(f"{module}." for module in SIDE)):
            parts.setdefault(published_name(ours), []).append(ours)
    found: dict[str, Published] = {}
    for name, names in parts.items():
        ordered = tuple(sorted(names, key=_place))
        rows, *rest = shapes[ordered[0]]
        found[name] = Published((sum(shapes[part][0] for part in ordered), *rest), ordered)
        if name == POSITIONS:
            found[name] = Published((1, rest[0] - 1, rest[1]), ordered)
        elif name == f"{SIGLIP}pos_embed":
            found[name] = Published((1, rows, *rest), ordered)
        elif name == HEAD:
            shape = (config.embedding_rows, *rest)
            found[name] = Published(shape, ordered, config.vocab_size - config.action_bins)
    return found | _unused(config, found)


def _place(name: str) -> int:
    """Query before key before value."""
    return next((place for place, part in enumerate(QUERY_KEY_VALUE) if f".{part}." in name), 0)


def _unused(config: OpenVLAOFTConfig, used: Mapping[str, Published]) -> dict[str, Published]:
    """The tensors that nothing depends on; the last block of a tower has the shapes of its first."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, tower in ((DINO, config.dino), (SIGLIP, config.siglip)):
        first, last = f"{module}blocks.0.", f"{module}blocks.{tower.layers}."
        shapes |= {last + name.removeprefix(first): e.shape for name, e in used.items() if name.startswith(first)}
        shapes |= {f"{module}norm.weight": (tower.width,), f"{module}norm.bias": (tower.width,)}
    width, mlp = config.siglip.width, config.siglip.mlp_width
    shapes[f"{SIGLIP}attn_pool.latent"] = (1, 1, width)
    shapes |= {f"{SIGLIP}attn_pool.norm.{kind}": (width,) for kind in ("weight", "bias")}
    sizes = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    for layer, (out, into) in (sizes | {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}).items():
        shapes |= {f"{SIGLIP}attn_pool.{layer}.weight": (out, into), f"{SIGLIP}attn_pool.{layer}.bias": (out,)}
    return {name: Published(shape) for name, shape in shapes.items()}


def to_ours(
    name: str, published: Published, stored: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Our parameters in the tensor `stored`: views of it, except for DINOv2's positions."""
    if name == POSITIONS:
        return {published.parts[0]: torch.cat([stored.new_zeros(1, 1, stored.shape[2]), stored], dim=1)}
    found, row = {}, published.first_row
    for part in published.parts:
        rows, *rest = shapes[part]
        found[part] = stored.reshape(-1, *rest)[row : row + rows]
        row += rows
    return found


def to_published(name: str, published: Published, ours: Mapping[str, Tensor], stored: Tensor) -> Tensor:
    """The published tensor with our parameters in it; `stored` says what is not ours.

    A class token's position that was learned is added to the class token, which comes to the same.
    """
    if not published.parts:
        return stored
    values = [ours[part] for part in published.parts]
    if name == POSITIONS:
        return values[0][:, 1:]
    if name == CLASS_TOKEN:
        position = ours[CLASS_POSITION][:, :1]
        return values[0] + position if position.any() else values[0]
    joined = torch.cat(values) if len(values) > 1 else values[0]
    if joined.numel() == stored.numel():
        return joined.reshape(published.shape)
    whole = stored.to(joined.device, joined.dtype, copy=True)
    whole[published.first_row : published.first_row + len(joined)] = joined
    return whole
