"""Checkpoints in the layout of LeRobot's `pi0_base`, made at a tiny size with its names and its config.json."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import ACTION, STATE, STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.merging.groups import group_of
from perennial.policies import _pi0_checkpoint, _pi0_config
from perennial.policies._pi0_model import PI0Network
from perennial.policies.pi0 import PI0
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation

OBSERVATION = example_observation(image_size=16, state_dim=STATE_DIM)

NAMES = {
    "pi0.model.vlm.language_model.embed_tokens.weight": "paligemma_with_expert.paligemma.lm_head.weight",
    "pi0.model.vlm.vision_tower.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "pi0.model.vlm.": "paligemma_with_expert.paligemma.model.",
    "pi0.model.dit.": "paligemma_with_expert.gemma_expert.model.",
    "pi0.embed_action_time.": "",
    "pi0.": "",
}


def published(name):
    own = next(own for own in NAMES if name.startswith(own))
    return NAMES[own] + name[len(own) :]


def greedy(policy):
    return policy.act(OBSERVATION, 0.0, [stream(0, "row", i) for i in range(len(OBSERVATION))]).actions


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def folder(tmp_path, policy, monkeypatch):
    """The published layout, at the tiny size."""
    config = policy.config
    monkeypatch.setitem(_pi0_checkpoint.GEMMA, "gemma_2b", config.language)
    monkeypatch.setitem(_pi0_checkpoint.GEMMA, "gemma_300m", config.expert)
    tiny = {name: getattr(config, name) for name in _pi0_checkpoint.PUBLISHED}
    monkeypatch.setattr(_pi0_checkpoint, "PUBLISHED", tiny)
    policy.save(tmp_path)
    write(tmp_path, {published(name): weight for name, weight in policy.acting_weights().items()})
    add(tmp_path, {"paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(config.vocab_size, 20)})
    feature = {"type": "VISUAL", "shape": [3, 16, 16]}
    values = {
        "type": "pi0",
        "input_features": {"observation.images.base": feature, "observation.state": {"type": "STATE", "shape": [3]}},
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "image_resolution": [16, 16],
        "chunk_size": 4,
        "n_action_steps": 3,
        "max_state_dim": 5,
        "max_action_dim": 4,
        "num_inference_steps": 4,
        "tokenizer_max_length": 24,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    stats = {
        f"{name}.{kind}": torch.tensor(getattr(moments, kind))
        for name, moments in (("observation.state", STATE), ("action", ACTION))
        for kind in ("mean", "std")
    }
    save_file(stats, tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    return tmp_path


def write(folder, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def add(folder, tensors):
    write(folder, load_file(folder / "model.safetensors") | tensors)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_published_checkpoint_acts_like_the_policy_it_was_made_from(folder, policy, prefix):
    write(folder, {f"{prefix}{name}": t for name, t in load_file(folder / "model.safetensors").items()})
    loaded = PI0.load(folder)
    assert loaded.config.views == 1
    np.testing.assert_allclose(greedy(loaded), greedy(policy), atol=1e-6)


def test_its_weights_may_be_split_and_hold_the_embedding_twice(folder, policy):
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["paligemma_with_expert.paligemma.lm_head.weight"]
    tensors["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = embedding
    names = sorted(tensors)
    for part, some in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name].clone() for name in some}, folder / f"model-0000{part}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    np.testing.assert_allclose(greedy(PI0.load(folder)), greedy(policy), atol=1e-6)


def test_openpis_statistics_come_first(folder, policy):
    stats = {"mean": [0.0] * 3, "std": [1.0] * 3, "q01": [-1.0] * 3}
    state = {"mean": list(STATE.mean), "std": list(STATE.std)}
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": state, "actions": stats}}))
    unit = (greedy(policy) - ACTION.mean) / ACTION.std
    np.testing.assert_allclose(greedy(PI0.load(folder)), unit, atol=1e-5)


def test_every_tensor_that_does_not_fit_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["state_proj.bias"]
    tensors["stray.weight"] = torch.zeros(1)
    tensors["action_out_proj.bias"] = torch.zeros(7)
    write(folder, tensors)
    with pytest.raises(PerennialError) as caught:
        PI0.load(folder)
    sentence = str(caught.value)
    assert "has action_out_proj.bias of shape [7] instead of [4]" in sentence
    assert "has unexpected stray.weight" in sentence
    assert "lacks pi0.embed_action_time.state_proj.bias" in sentence
    assert sentence.count(".weight") == 1


def test_what_has_to_be_put_into_the_folder_is_said(folder):
    (folder / "policy_preprocessor_step_5_normalizer_processor.safetensors").unlink()
    with pytest.raises(PerennialError, match=r"put the norm_stats\.json"):
        PI0.load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "norm_stats.json").write_text(json.dumps({n: {"mean": [0], "std": [1]} for n in ("state", "actions")}))
    with pytest.raises(PerennialError, match=r"put that of google/paligemma"):
        PI0.load(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"type": "act"}, "checkpoint of 'act', which pi0 cannot read; choose one of pi0"),
        ({"chunk_size": 2}, "executed is 3, not between 1 and the horizon 2"),
        ({"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "QUANTILES"}}, "only MEAN_STD is known"),
        ({"paligemma_variant": "gemma_9b"}, "gemma_9b"),
    ],
)
def test_configs_that_it_cannot_follow_are_refused(folder, change, sentence):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(PerennialError, match=sentence):
        PI0.load(folder)


def test_damaged_folders_are_refused(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:200])
    with pytest.raises(PerennialError, match="cannot be read"):
        PI0.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PerennialError, match=r"pickled \(pytorch_model\.bin\).*`perennial convert "):
        PI0.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(PerennialError, match=r"has no model\.safetensors"):
        PI0.load(folder)
    with pytest.raises(PerennialError, match=r"config\.json"):
        PI0.load(folder / "nowhere")


def test_own_and_published_names_belong_to_the_same_group(policy):
    for group, names in policy.groups.items():
        assert {group_of(name) for name in names} == {group}
        assert {group_of(published(name)) for name in names} == {group}
        assert {_pi0_checkpoint.module_name(published(name)) for name in names} == set(names)


def test_the_published_sizes_are_those_of_the_3b_model():
    moments = _pi0_config.Moments((0.0,), (1.0,))
    with torch.device("meta"):
        network = PI0Network(_pi0_config.PI0Config(moments, moments))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.24e9, rel=0.01)
