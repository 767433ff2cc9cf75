"""What a published OpenVLA folder says about the model, and `perennial.json` beside it for what it does not say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

from perennial.errors import PerennialError, unknown
from perennial.policies._openvla.config import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Language,
    NormStats,
    OpenVLAOFTConfig,
    Quantiles,
    Tower,
    read,
)

SETTINGS = "perennial.json"
LIBERO_CAMERA = 256
"""Pixels of the pictures in the data sets made of LIBERO's demonstrations."""
STOP_TOKEN_ID = 2
"""Llama's end of a sequence."""


@dataclass(frozen=True)
class Towers:
    """The two vision transformers; see `Tower` for what is computed of them."""

    patch_size: int
    dino: Tower
    siglip: Tower


TOWERS: Mapping[tuple[str, ...], Towers] = {
    ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"): Towers(
        patch_size=14,
        dino=Tower(1024, 23, 16, 4096, IMAGENET_MEAN, IMAGENET_STD, registers=4),
        siglip=Tower(1152, 26, 16, 4304, HALF, HALF),
    )
}
"""By the `timm_model_ids` of config.json."""


@dataclass(frozen=True)
class Settings:
    """The fields of `perennial.json`, each of them optional.

    Attributes:
        unnorm_key: whose statistics in `dataset_statistics.json` or `norm_stats` map actions and states.
        chunk: actions per decision; None takes what the policy's kind was published with.
        hold: environment steps for which each action is held.
        layout: of the action slots; "official" puts the stop token after them, "rl" nothing (models trained for or by
            reinforcement learning with a token head).
        empty_token: the prompt ends in the tokenizer's "▁", as it did in training.
        camera_size, gripper: see `OpenVLAOFTConfig`; None takes 256 and "libero" for statistics whose name begins with
            "libero", as those data sets were drawn at 256 pixels and say 1 for an open gripper.
        views, use_proprio, center_crop, max_prompt_length: see `OpenVLAOFTConfig`.
        dtype: of the weights in memory.
        towers: sizes of vision towers that are not the published ones.
    """

    unnorm_key: str | None = None
    chunk: int | None = None
    hold: int = 1
    layout: Literal["rl", "official"] = "rl"
    empty_token: bool = True
    views: int = 1
    use_proprio: bool = False
    center_crop: bool = False
    camera_size: int | None = None
    gripper: Literal["unchanged", "libero"] | None = None
    max_prompt_length: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    towers: Towers | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, as JSON types."""
        plain, default = asdict(self), asdict(Settings())
        return {name: value for name, value in plain.items() if value != default[name]}


CHOICES = {
    "layout": ("rl", "official"),
    "gripper": ("unchanged", "libero"),
    "dtype": ("float32", "bfloat16"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        PerennialError: the file is missing or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        raise PerennialError(
            f"The checkpoint {path.parent} has no {path.name}; copy or download the folder again."
        ) from None
    except ValueError as error:
        raise PerennialError(f"{path} cannot be read ({error}); copy or download the folder again.") from error
    return values


def read_settings(folder: Path) -> Settings:
    """The settings in `folder`/perennial.json, or the defaults where there is no such file.

    Raises:
        PerennialError: a field is unknown or has a value that it cannot have.
    """
    path = folder / SETTINGS
    values = read_json(path) if path.is_file() else {}
    for name, value in values.items():
        if name not in {f.name for f in fields(Settings)}:
            raise unknown(f"setting in {path}", name, (f.name for f in fields(Settings)))
        if value is not None and name in CHOICES and value not in CHOICES[name]:
            raise PerennialError(f"{name} is {value!r} in {path}; choose one of {', '.join(CHOICES[name])}.")
        if not _fits(value, get_type_hints(Settings)[name]):
            raise PerennialError(f"{name} cannot be {value!r} in {path}; see docs/models.md for its values.")
    try:
        if values.get("towers") is not None:
            parts = {name: read(Tower, values["towers"][name]) for name in ("dino", "siglip")}
            values["towers"] = Towers(values["towers"]["patch_size"], **parts)
        return Settings(**values)
    except (KeyError, TypeError) as error:
        raise PerennialError(f"towers in {path} cannot be read ({error}); correct it.") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a number, text or truth value is one of `kind`; numbers are counts. Others are read later."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = {int, bool, str} & set(kinds)
    if not plain or (value is None and type(None) in kinds):
        return True
    return type(value) in plain and (type(value) is not int or value > 0)


def read_config(folder: Path, settings: Settings, chunk: int, empty_token_id: int | None) -> OpenVLAOFTConfig:
    """The model that `folder` describes.

    Args:
        folder: as published.
        settings: of the folder.
        chunk: actions per decision where the settings leave it open.
        empty_token_id: of "▁", where the tokenizer has it.

    Raises:
        PerennialError: the architecture is not OpenVLA's, or the choice of statistics is open.
    """
    path = folder / "config.json"
    published = read_json(path)
    text = published.get("text_config") or {}
    towers = _known_towers(path, published, settings)
    if settings.empty_token and empty_token_id is None:
        raise PerennialError(
            f"The tokenizer in {folder} has no token '▁'; set \"empty_token\": false in {folder / SETTINGS}."
        )
    towers = _normalised(folder, towers)
    vocabulary = text.get("vocab_size", 32000)
    try:
        key, norm_stats = _statistics(folder, published, settings)
        of_libero = key.startswith("libero")
        return OpenVLAOFTConfig(
            image_size=published["image_sizes"][0],
            patch_size=towers.patch_size,
            dino=towers.dino,
            siglip=towers.siglip,
            projector_width=4 * (towers.dino.width + towers.siglip.width),
            language=_language(text),
            vocab_size=vocabulary - published["pad_to_multiple_of"],
            embedding_rows=vocabulary,
            action_bins=published["n_action_bins"],
            chunk=settings.chunk or chunk,
            hold=settings.hold,
            norm_stats=norm_stats,
            use_proprio=settings.use_proprio,
            bos_token_id=text.get("bos_token_id", 1),
            views=settings.views,
            center_crop=settings.center_crop,
            camera_size=settings.camera_size or (LIBERO_CAMERA if of_libero else None),
            max_prompt_length=settings.max_prompt_length,
            prompt_end=(empty_token_id,) if settings.empty_token and empty_token_id is not None else (),
            stop_token_id=STOP_TOKEN_ID if settings.layout == "official" else None,
            gripper=settings.gripper or ("libero" if of_libero else "unchanged"),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PerennialError(f"{path} cannot be read ({error!r}); copy or download the folder again.") from error


def first_action_token(published: Mapping[str, Any]) -> int:
    """The first of the tokens that stand for actions, the last of the vocabulary before its padding.

    Raises:
        KeyError: config.json does not say.
    """
    vocabulary: int = (published.get("text_config") or {}).get("vocab_size", 32000)
    return vocabulary - int(published["pad_to_multiple_of"]) - int(published["n_action_bins"])


def _known_towers(path: Path, published: Mapping[str, Any], settings: Settings) -> Towers:
    """The vision towers that the config.json at `path` names.

    Raises:
        PerennialError: the architecture is not OpenVLA's.
    """
    text = published.get("text_config") or {}
    towers = settings.towers or TOWERS.get(tuple(published.get("timm_model_ids") or ()))
    if towers is None or text.get("model_type", "llama") != "llama" or text.get("rope_scaling"):
        raise PerennialError(
            f"{path} describes {published.get('vision_backbone_id')!r} with {published.get('llm_backbone_id')!r}, but "
            "OpenVLA here is 'dinosiglip-vit-so-224px' with a Llama-2; choose such a checkpoint."
        )
    return towers


def _language(text: Mapping[str, Any]) -> Language:
    """The Llama that a `text_config` describes; what it leaves out is that of Llama-2 7B."""
    heads = text.get("num_attention_heads", 32)
    return Language(
        width=text.get("hidden_size", 4096),
        layers=text.get("num_hidden_layers", 32),
        heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        mlp_width=text.get("intermediate_size", 11008),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=text.get("rope_theta", 10000.0),
    )


def _normalised(folder: Path, towers: Towers) -> Towers:
    """`towers` with the image normalisation of preprocessor_config.json, where there is one."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return towers
    published = read_json(path)
    if published.get("image_resize_strategy", "resize-naive") != "resize-naive":
        raise PerennialError(
            f"{path} asks for {published['image_resize_strategy']!r} images, but only 'resize-naive' is known; "
            "choose a checkpoint that was trained with it."
        )
    both = [
        {"mean": tuple(one["mean"]), "std": tuple(one["std"])} for one in published.get("tvf_normalize_params") or []
    ]
    if len(both) != 2:
        return towers
    dino, siglip = (Tower(**(asdict(t) | new)) for t, new in zip((towers.dino, towers.siglip), both, strict=True))
    return Towers(towers.patch_size, dino, siglip)


def _statistics(folder: Path, published: Mapping[str, Any], settings: Settings) -> tuple[str, NormStats]:
    """Name and values of the chosen statistics; those of fine-tuning, if any, take the place of the model's own."""
    path = folder / "dataset_statistics.json"
    known = read_json(path) if path.is_file() else published.get("norm_stats")
    if not known:
        raise PerennialError(
            f"{folder} has no statistics of actions, neither norm_stats in config.json nor dataset_statistics.json; "
            "copy the latter from the training run into it."
        )
    key = settings.unnorm_key or (next(iter(known)) if len(known) == 1 else None)
    if key is None:
        example = json.dumps({"unnorm_key": next(iter(known), "")})
        raise PerennialError(
            f"{folder} has statistics of {len(known)} data sets; choose one, for example by {example} in "
            f"{folder / SETTINGS} (there are: {', '.join(sorted(known))})."
        )
    if key not in known:
        raise unknown(f"data set in the statistics of {folder}", key, known)
    proprio = known[key].get("proprio") if settings.use_proprio else None
    return key, NormStats(_quantiles(known[key]["action"]), _quantiles(proprio) if proprio else None)


def _quantiles(stats: Mapping[str, Any]) -> Quantiles:
    return Quantiles(tuple(stats["q01"]), tuple(stats["q99"]), tuple(bool(used) for used in stats.get("mask") or ()))
