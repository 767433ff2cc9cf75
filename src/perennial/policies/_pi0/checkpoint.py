"""Reading pi-0 checkpoints: our own folders, and those in the layout of LeRobot's `pi0_base`.

A LeRobot folder has a config.json with `"type": "pi0"` and weights under openpi's names. Two things have to be put into
it: PaliGemma's tokenizer.json, and, where the folder has no normaliser of LeRobot's, a norm_stats.json as openpi writes
it, with the mean and std of `state` and `actions`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from perennial.errors import PerennialError
from perennial.policies._families import wrong_family
from perennial.policies._flow.lerobot_layout import Names
from perennial.policies._pi0.config import GEMMA, Exploration, Moments, PI0Config, Vision

C = TypeVar("C", bound=PI0Config)

RENAMED = (
    (r"^(model\.)?paligemma_with_expert\.paligemma\.lm_head\.", "pi0.model.vlm.language_model.embed_tokens."),
    (r"^(model\.)?paligemma_with_expert\.paligemma\.model\.", "pi0.model.vlm."),
    (r"^(model\.)?paligemma_with_expert\.gemma_expert\.model\.", "pi0.model.dit."),
    (r"^(model\.)?(state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out)\.", r"pi0.embed_action_time.\2."),
    (r"^(model\.)?action_out_proj\.", "pi0.action_out_proj."),
    (r"^pi0\.model\.vlm\.vision_tower\.vision_model\.", "pi0.model.vlm.vision_tower."),
)
"""Published names -> names of the module, applied one after another."""

PUBLISHED: dict[str, Any] = {"vision": Vision(), "vocab_size": 257152, "bos_token_id": 2}
"""What a LeRobot config.json leaves unsaid."""

UNUSED = re.compile(r"(gemma_expert\.lm_head|model\.dit\.embed_tokens)\.weight$")
"""The expert's word embedding, which the published files hold and nothing reads."""


def module_name(published: str) -> str:
    """The parameter that a tensor of a published or own file belongs to."""
    for pattern, replacement in RENAMED:
        published = re.sub(pattern, replacement, published)
    return published


NAMES = Names(module_name, UNUSED)


def read_config(folder: Path) -> PI0Config:
    """The configuration of a checkpoint of either layout; see `read_layouts`."""
    return read_layouts(folder, "pi0", PI0Config, _from_lerobot)


def read_layouts(
    folder: Path,
    kind: str,
    own: type[C],
    from_lerobot: Callable[[Mapping[str, Any], Moments, Moments], C],
) -> C:
    """The configuration of a checkpoint, ours or in LeRobot's layout.

    Args:
        folder: of the checkpoint.
        kind: what both layouts call the policy.
        own: reads ours.
        from_lerobot: reads theirs, given the statistics of states and actions.

    Raises:
        PerennialError: config.json or the statistics are missing, damaged or of another kind.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
        if kind in values:
            return own.from_json(values[kind])
        if values.get("type") == kind:
            return from_lerobot(values, *statistics(folder))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise PerennialError(f"config.json in {folder} cannot be used ({error!r}); copy the folder again.") from error
    raise wrong_family(folder, values, kind)


def shared_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What LeRobot's config.json says of every flow policy in the same words, as fields of the configuration.

    `camera_size` is None where the pictures are not all squares of one size.
    """
    shapes = [feature["shape"] for feature in values["input_features"].values() if feature["type"] == "VISUAL"]
    sides = {side for shape in shapes for side in shape[1:]}
    return {
        "camera_size": sides.pop() if len(sides) == 1 else None,
        "views": len(shapes),
        "horizon": values["chunk_size"],
        "executed": values["n_action_steps"],
        "max_state_dim": values["max_state_dim"],
        "max_action_dim": values["max_action_dim"],
        "max_prompt_length": values["tokenizer_max_length"],
        "exploration": Exploration(**values.get("exploration", {})),
    }


def _from_lerobot(values: Mapping[str, Any], state: Moments, action: Moments) -> PI0Config:
    scaling = values["normalization_mapping"]
    if {scaling["STATE"], scaling["ACTION"]} != {"MEAN_STD"}:
        raise ValueError(f"normalization_mapping is {scaling}, but only MEAN_STD is known")
    return PI0Config(
        state=state,
        action=action,
        language=GEMMA[values["paligemma_variant"]],
        expert=GEMMA[values["action_expert_variant"]],
        image_size=values["image_resolution"][0],
        denoising_steps=values["num_inference_steps"],
        **shared_fields(values),
        **PUBLISHED,
    )


def statistics(folder: Path) -> tuple[Moments, Moments]:
    """Statistics of state and action, from openpi's norm_stats.json or LeRobot's normaliser."""
    path = folder / "norm_stats.json"
    if path.is_file():
        stats = json.loads(path.read_text())
        stats = stats.get("norm_stats", stats)
        return _moments(stats["state"]), _moments(stats["actions"])
    for path in sorted(folder.glob("policy_preprocessor*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
        if "action.mean" in tensors:
            return tuple(  # type: ignore[return-value]
                _moments({kind: tensors[f"{name}.{kind}"] for kind in ("mean", "std")})
                for name in ("observation.state", "action")
            )
    raise PerennialError(
        f"The checkpoint {folder} comes without statistics of states and actions; put the norm_stats.json of your "
        "robot's data into it."
    )


def _moments(values: Mapping[str, Iterable[float]]) -> Moments:
    mean, std = (tuple(map(float, values[kind])) for kind in ("mean", "std"))
    return Moments(mean, std)
