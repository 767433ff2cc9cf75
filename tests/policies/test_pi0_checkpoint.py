"""Checkpoints in the layout of LeRobot's `pi0_base`, made at a tiny size with its names and its config.json."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import ACTION, STATE, STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.merging.groups import group_of
from perennial.policies._pi0 import checkpoint as pi0_checkpoint
from perennial.policies._pi0 import config as pi0_config
from perennial.policies._pi0.model import PI0Network
from perennial.policies.lora import LoRA, add_adapter
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
    monkeypatch.setitem(pi0_checkpoint.GEMMA, "gemma_2b", config.language)
    monkeypatch.setitem(pi0_checkpoint.GEMMA, "gemma_300m", config.expert)
    tiny = {name: getattr(config, name) for name in pi0_checkpoint.PUBLISHED}
    monkeypatch.setattr(pi0_checkpoint, "PUBLISHED", tiny)
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


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"
    }


def split(folder):
    """Deal the tensors out among two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    places = {name: file for file, some in files.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))
    (folder / "model.safetensors").unlink()


def tensors_by_file(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("model*.safetensors"))}


@pytest.mark.parametrize("files", [1, 2])
def test_what_was_read_from_lerobots_layout_is_written_in_it(folder, files, tmp_path):
    if files == 2:
        split(folder)
    (folder / "README.md").write_text("words")
    (folder / "training_state.pt").write_bytes(b"a pickle")
    policy = PI0.load(folder)
    again = tmp_path / "again"
    policy.save(again)
    before = contents(folder)
    del before["training_state.pt"]
    left, found = (
        {name: json.loads(text) if "index" in name else text for name, text in all_.items()}
        for all_ in (before, contents(again))
    )
    assert {name: found[name] for name in left} == left
    stored, written = tensors_by_file(folder), tensors_by_file(again)
    assert written.keys() == stored.keys()
    for file, tensors in stored.items():
        assert written[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert written[file][name].dtype == tensor.dtype
            assert torch.equal(written[file][name], tensor), name
    add_adapter(policy, LoRA(rank=2), 0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05
    policy.save(tmp_path / "taught", torch.bfloat16)
    taught = PI0.load(tmp_path / "taught")
    for name, weight in policy.acting_weights().items():
        assert torch.equal(dict(taught.model.named_parameters())[name], weight.bfloat16().float()), name
    policy.save(tmp_path / "exact")
    np.testing.assert_allclose(greedy(PI0.load(tmp_path / "exact")), greedy(policy), atol=1e-4)


def test_the_network_of_flow_noise_is_written_beside_what_was_published(folder, tmp_path):
    split(folder)
    values = json.loads((folder / "config.json").read_text())
    noise = {"steps": "all", "method": "noise", "lowest": 0.2, "highest": 0.6}
    (folder / "config.json").write_text(json.dumps(values | {"exploration": noise}))
    policy = PI0.load(folder)
    with torch.no_grad():
        policy.model.noise_network.fc2.bias.fill_(0.25)
    policy.save(tmp_path / "again")
    again = PI0.load(tmp_path / "again").model.noise_network
    assert torch.equal(again.fc2.bias, policy.model.noise_network.fc2.bias)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {n: file for file, all_ in tensors_by_file(tmp_path / "again").items() for n in all_}


def test_a_source_that_has_changed_is_not_written_from(folder, tmp_path):
    policy = PI0.load(folder)
    add(folder, {"stray.weight": torch.zeros(1)})
    with pytest.raises(PerennialError, match="has changed since it was read"):
        policy.save(tmp_path / "again")


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
        assert {pi0_checkpoint.module_name(published(name)) for name in names} == set(names)


def test_the_published_sizes_are_those_of_the_3b_model():
    moments = pi0_config.Moments((0.0,), (1.0,))
    with torch.device("meta"):
        network = PI0Network(pi0_config.PI0Config(moments, moments))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.24e9, rel=0.01)
