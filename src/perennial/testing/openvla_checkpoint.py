"""Generates OpenVLA checkpoints in the published layout with random weights, of any size.

Only `perennial.json`, which gives the towers' sizes, is not as on the Hugging Face hub: published checkpoints name
towers whose sizes are known.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from perennial.policies._openvla.config import HALF, IMAGENET_MEAN, IMAGENET_STD, Tower
from perennial.policies._openvla.keys import key_map
from perennial.policies._openvla.settings import SETTINGS, Settings, Towers, read_config, read_settings
from perennial.policies._tokenizer import prompt
from perennial.policies.lora import base_shapes
from perennial.randomness import stream
from perennial.testing.policy_conformance import INSTRUCTIONS

TINY_TOWERS = Towers(
    patch_size=8,
    dino=Tower(24, 2, 2, 48, IMAGENET_MEAN, IMAGENET_STD, registers=3),
    siglip=Tower(32, 2, 2, 40, HALF, HALF),
)
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_STATISTICS: Mapping[str, Any] = {
    "tiny_no_noops": {
        "action": {"q01": [-0.5, 0.0, 0.0], "q99": [0.5, 2.0, 1.0], "mask": [True, True, False]},
        "proprio": {"q01": [-1.0, -1.0, -1.0], "q99": [1.0, 1.0, 1.0]},
        "num_transitions": 100,
        "num_trajectories": 10,
    }
}
PADDING = 64
STANDARD_DEVIATION = 0.2


def write_openvla_checkpoint(
    folder: Path,
    *,
    towers: Towers = TINY_TOWERS,
    image_size: int = 32,
    text: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] = TINY_STATISTICS,
    action_bins: int = 16,
    settings: Mapping[str, Any] | None = None,
    instructions: Sequence[str] = INSTRUCTIONS,
    files: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    deviation: float = STANDARD_DEVIATION,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `folder` and return it.

    Args:
        folder: is created.
        towers: sizes of the vision towers.
        image_size: side of their images in pixels.
        text: sizes of the Llama, in the words of its config.
        statistics: by data set, as in `norm_stats`.
        action_bins: edges of the action bins.
        settings: fields of perennial.json beside the towers.
        instructions: what the tokenizer learns its pieces from.
        files: among which the tensors are dealt out; one is written without an index.
        dtype: of the tensors.
        deviation: of the weights, which are normal numbers.
        seed: names the weights.
    """
    folder.mkdir(parents=True)
    entries = _write_tokenizer(folder, instructions, action_bins)
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "image_sizes": [image_size, image_size],
        "image_resize_strategy": "resize-naive",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "llm_max_length": 2048,
        "n_action_bins": action_bins,
        "pad_token_id": entries,
        "pad_to_multiple_of": PADDING,
        "norm_stats": statistics,
        "text_config": {"model_type": "llama", "vocab_size": entries + PADDING, **(text or TINY_TEXT)},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor(towers, image_size))
    _write_json(folder / SETTINGS, {"towers": dataclasses.asdict(towers), **(settings or {})})
    _write_weights(folder, files, dtype, deviation, seed)
    return folder


def _write_tokenizer(folder: Path, instructions: Sequence[str], action_bins: int) -> int:
    """A byte-pair tokenizer with Llama-2's first ids and blanks, whose last entries occur in no text.

    Returns:
        The size of its vocabulary.
    """
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([prompt(text) for text in instructions], trainer)
    content = json.loads(tokenizer.to_str())
    entries = content["model"]["vocab"]
    entries |= {f"<action {number}>": len(entries) + number for number in range(action_bins)}
    _write_json(folder / "tokenizer.json", content)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "right"},
    )
    return len(entries)


def _preprocessor(towers: Towers, image_size: int) -> dict[str, Any]:
    both = (towers.dino, towers.siglip)
    return {
        "processor_class": "PrismaticProcessor",
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, image_size, image_size]] * 2,
        "interpolations": ["bicubic", "bicubic"],
        "means": [tower.mean for tower in both],
        "stds": [tower.std for tower in both],
        "tvf_normalize_params": [{"inplace": False, "mean": tower.mean, "std": tower.std} for tower in both],
    }


def _write_weights(folder: Path, files: int, dtype: torch.dtype, deviation: float, seed: int) -> None:
    from perennial.policies._openvla.model import OpenVLAOFTModel

    config = read_config(folder, read_settings(folder), chunk=1, empty_token_id=0)
    with torch.device("meta"):
        shapes = base_shapes(OpenVLAOFTModel(dataclasses.replace(config, use_proprio=False)))
    published = key_map(config, shapes)
    names = list(published)
    share = math.ceil(len(names) / files)
    where: dict[str, str] = {}
    for number in range(files):
        part = names[number * share : (number + 1) * share]
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        tensors = {name: _random(name, published[name].shape, deviation, seed).to(dtype) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if files > 1:
        size = sum(math.prod(entry.shape) for entry in published.values()) * dtype.itemsize
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))},
        )


def _random(name: str, shape: tuple[int, ...], deviation: float, seed: int) -> Tensor:
    """Small normal numbers, around 1 for what scales."""
    noise = stream(seed, "checkpoint", name).standard_normal(shape, dtype="float32") * deviation
    scales = "norm" in name and name.endswith("weight")
    return torch.from_numpy(noise) + float(scales)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


__all__ = ["Settings", "write_openvla_checkpoint"]
