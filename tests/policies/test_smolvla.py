"""SmolVLA against numbers that LeRobot's code gave, and its checkpoints in LeRobot's layout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import flow_losses, set_weights
from tiny_smolvla import ACTION, STATE, STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.merging.groups import group_of
from perennial.policies._smolvla import config as smolvla_config
from perennial.policies._smolvla.config import SmolVLAConfig
from perennial.policies._smolvla.model import SmolVLANetwork
from perennial.policies.smolvla import SmolVLA
from perennial.testing.policy_conformance import example_observation

OBSERVATION = example_observation(image_size=16, state_dim=STATE_DIM)
ROWS = len(OBSERVATION)

LEROBOT_ACTIONS = [
    [-0.19073, -0.223774, -0.04614, -0.185554, -0.237311, -0.062626, -0.181586, -0.247982, -0.076419],
    [-0.253494, -0.194643, -0.039184, -0.246972, -0.206253, -0.049457, -0.241848, -0.215071, -0.059074],
    [-0.139796, -0.295519, -0.117022, -0.137491, -0.302851, -0.128886, -0.136709, -0.307471, -0.138151],
    [-0.217913, -0.177557, -0.075948, -0.209585, -0.19544, -0.09159, -0.20243, -0.209512, -0.104286],
    [-0.378389, -0.050934, -0.029243, -0.364675, -0.069081, -0.045029, -0.353155, -0.084636, -0.057053],
    [-0.232292, -0.171963, -0.128275, -0.224448, -0.185297, -0.140735, -0.218583, -0.194882, -0.150666],
]
"""`VLAFlowMatching.sample_actions` of LeRobot (7427f318, src/lerobot/policies/smolvla) from noise of zeros."""

LEROBOT_LOSSES = [1.244633, 0.666539, 1.25642, 1.212849, 1.312116, 1.280059]
"""The mean over all numbers of what its `forward` gives for actions of zeros, noise and times as below."""


@pytest.fixture(scope="module")
def policy():
    expert = replace(tiny_policy().config.expert, mlp_width=256)
    policy = tiny_policy(expert=expert)
    set_weights(policy.model)
    return policy


def greedy(policy):
    return policy.act(OBSERVATION, 0.0, [None] * ROWS).actions


def test_it_decides_as_lerobots(policy):
    unit = (greedy(policy) - ACTION.mean) / ACTION.std
    np.testing.assert_allclose(unit.reshape(ROWS, -1), LEROBOT_ACTIONS, atol=1e-5)


def test_its_flow_is_lerobots(policy):
    np.testing.assert_allclose(flow_losses(policy), LEROBOT_LOSSES, rtol=1e-4)


@pytest.fixture
def folder(tmp_path, policy, monkeypatch):
    """The published layout, at the tiny size."""
    config = policy.config
    tiny = SmolVLAConfig(config.state, config.action, **{name: getattr(config, name) for name in SIZES})
    monkeypatch.setattr(smolvla_config, "SmolVLAConfig", lambda *_: tiny)
    monkeypatch.setattr(smolvla_config, "_perceptron", lambda width: 256)
    policy.save(tmp_path)
    tensors = {f"model.{name}": weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    tensors["model.vlm_with_expert.vlm.lm_head.weight"] = torch.zeros(config.vocab_size, 24)
    tensors["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    feature = {"type": "VISUAL", "shape": [3, 24, 24]}
    values = {
        "type": "smolvla",
        "input_features": {"observation.images.top": feature, "observation.state": {"type": "STATE", "shape": [3]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "attention_mode": "cross_attn",
        "add_image_special_tokens": False,
        "num_vlm_layers": 4,
        "num_expert_layers": -1,
        "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.8334,
        "resize_imgs_with_padding": [16, 16],
        "chunk_size": 4,
        "n_action_steps": 3,
        "max_state_dim": 5,
        "max_action_dim": 4,
        "num_steps": 4,
        "tokenizer_max_length": 24,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    stats = {name: {"mean": m.mean, "std": m.std} for name, m in (("state", STATE), ("actions", ACTION))}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return tmp_path


SIZES = ("vocab_size", "vision", "language", "expert", "shuffle")


def test_a_published_checkpoint_acts_like_the_policy_it_was_made_from(folder, policy):
    loaded = SmolVLA.load(folder)
    assert replace(loaded.config, exploration=policy.config.exploration, camera_size=None) == policy.config
    assert (loaded.image_size, policy.image_size) == (24, 16)
    np.testing.assert_array_equal(greedy(loaded), greedy(policy))


def test_it_is_written_as_it_was_read(folder, tmp_path):
    SmolVLA.load(folder).save(tmp_path / "again")
    stored, written = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "again"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    for name in ("config.json", "norm_stats.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_how_it_explores_is_read_from_the_folder_and_flow_noise_is_refused(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"exploration": {"steps": "all", "level": 0.3}}))
    assert SmolVLA.load(folder).config.exploration.level == 0.3
    path.write_text(json.dumps(values | {"exploration": {"steps": "all", "method": "noise"}}))
    with pytest.raises(PerennialError, match="method is 'noise', but only 'sde' is known"):
        SmolVLA.load(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"type": "pi0"}, "checkpoint of 'pi0', which smolvla cannot read; set --policy.name pi0"),
        ({"attention_mode": "self_attn"}, "only 'cross_attn' is known"),
        ({"num_expert_layers": 2}, "only 4 is known"),
        ({"vlm_model_name": "another/model"}, "SmolVLM2-500M in vlm_model_name is False"),
    ],
)
def test_configs_that_it_cannot_follow_are_refused(folder, change, sentence):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(PerennialError, match=sentence):
        SmolVLA.load(folder)


def test_every_tensor_that_does_not_fit_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.state_proj.bias"]
    save_file(tensors | {"model.stray.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(PerennialError, match=r"has unexpected model\.stray\.weight, lacks state_proj\.bias"):
        SmolVLA.load(folder)


def test_own_and_published_names_belong_to_the_same_group(policy):
    for group, names in policy.groups.items():
        assert {group_of(f"model.{name}") for name in names} == {group}


def test_the_published_sizes_are_those_of_the_model_of_450_million():
    """With the word head, which is published and not read."""
    with torch.device("meta"):
        network = SmolVLANetwork(SmolVLAConfig(ACTION, ACTION))
    assert sum(p.numel() for p in network.parameters()) + 49280 * 960 == pytest.approx(450e6, rel=0.001)
    assert smolvla_config._perceptron(720) == 2048
