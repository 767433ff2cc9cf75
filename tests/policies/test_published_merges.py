"""Merging published checkpoints by group: what is loaded from the result, against the groups of the policy."""

import json
import shutil

import numpy as np
import pytest
import tiny_smolvla
import torch
from safetensors.torch import load_file, save_file
from test_pi0_checkpoint import published
from tiny_pi0 import tiny_policy

from perennial.errors import PerennialError
from perennial.merging.checkpoints import merge_checkpoints
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter, save_adapter
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.policies.openvla_oft_l1 import OpenVLAOFTL1
from perennial.randomness import stream
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import example_observation

SHARES = {"vision": 0.0, "language": 0.5, "action": 1.0}
HEAD = {"layer_norm1": 96, "fc1": (32, 96), "layer_norm2": 32, "fc2": (3, 32)}
BLOCKS = {f"mlp_resnet_blocks.{i}.ffn.{j}": size for i in (0, 1) for j, size in ((0, 32), (1, (32, 32)))}
PROPRIO = {"fc1": (32, 3), "fc2": (32, 32)}


def in_between(first, second, groups):
    """What `SHARES` makes of two state dicts."""
    of_name = {name: SHARES[group] for group, names in groups.items() for name in names}
    return {name: torch.lerp(first[name], second[name], of_name[name]) for name in first}


def write_module(path, sizes, prefix, seed, dtype):
    tensors = {}
    for name, size in sizes.items():
        for kind, shape in (("weight", size), ("bias", size if isinstance(size, int) else size[0])):
            numbers = stream(seed, "module", name, kind).standard_normal(shape, dtype="float32")
            tensors[f"{prefix}{name}.{kind}"] = torch.from_numpy(numbers).to(dtype)
    save_file(tensors, path)


def published_folder(folder, kind, seed=0, dtype=torch.float32):
    """A generated OpenVLA with a proprioceptive projector and, for `OpenVLAOFTL1`, a regression head beside."""
    settings = {"chunk": 2, "use_proprio": True, "layout": "official"}
    write_openvla_checkpoint(folder, settings=settings, dtype=dtype, seed=seed)
    step = f"--{seed}0000_checkpoint.safetensors"
    write_module(folder / f"proprio_projector{step}", PROPRIO, "module.", seed, dtype)
    if kind is OpenVLAOFTL1:
        write_module(folder / f"action_head{step}", HEAD | BLOCKS, "module.model.", seed, dtype)
    return folder


def learned_adapter(policy, folder):
    """An adapter on every linear layer of `policy` that changes all of them, as a run writes it."""
    add_adapter(policy, LoRA(rank=2, alpha=3), 0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                drawn = stream(0, "adapter", name).normal(0, 0.05, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    save_adapter(policy, folder, "published")


def tensors_in(folder):
    return {f"{file.name}/{n}": t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def decided(policy, observation):
    """What the policy's head says after the tokens of resting: logits, or numbers where there are none."""
    if isinstance(policy, OpenVLAOFTL1):
        return torch.from_numpy(policy.act(observation, 0.0, [None] * len(observation)).actions)
    sample = policy.encode(np.zeros((len(observation), policy.chunk_steps, 3)))
    with torch.no_grad():
        return policy.logits(Batch(observation, sample, np.ones(sample.shape, bool), 1.0))


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (OpenVLAOFT, torch.float32, 1e-5),
        (OpenVLA, torch.bfloat16, 0.05),
        (OpenVLAOFTL1, torch.float32, 1e-5),
    ],
)
def test_a_learned_adapter_is_folded_into_a_published_openvla(kind, dtype, tolerance, tmp_path):
    base = published_folder(tmp_path / "base", kind, dtype=dtype)
    policy, plain = (kind.load(base, torch.float32) for _ in range(2))
    learned_adapter(policy, tmp_path / "adapter")
    report = merge_checkpoints(base, tmp_path / "adapter", tmp_path / "merged", alpha=1.0)
    merged = kind.load(tmp_path / "merged", torch.float32)
    observation = example_observation(policy.image_size, 3)
    said, before, after = (decided(each, observation) for each in (policy, plain, merged))
    scale = said.abs().max()
    assert (before - said).abs().max() > 0.1 * scale
    assert (after - said).abs().max() < tolerance * scale
    policy.save(tmp_path / "saved", dtype)
    half = dtype == torch.bfloat16
    old, found, saved = (tensors_in(tmp_path / name) for name in ("base", "merged", "saved"))
    changed = {name for name in old if not torch.equal(old[name], found[name])}
    assert found.keys() == old.keys()
    assert report.changed == len(changed)
    names = {name: name.replace("--00000_", "--0_").replace("/module.", "/") for name in old}
    assert changed == {name for name in old if not torch.equal(old[name], saved[names[name]])}
    for part in ("qkv.weight", "lm_head", "projector.fc1", "self_attn.q_proj", "proprio_projector"):
        assert any(part in name for name in changed), part
    rows = torch.ones(policy.config.embedding_rows, dtype=torch.bool)
    rows[policy.config.vocab_size - policy.config.action_bins : policy.config.vocab_size] = False
    head = next(name for name in old if "lm_head" in name)
    assert torch.equal(found[head][rows], old[head][rows])
    for name in changed:
        torch.testing.assert_close(found[name], saved[names[name]], rtol=8e-3 if half else 1e-5, atol=1e-6, msg=name)


def test_an_adapter_of_another_base_is_refused_by_the_name_of_its_layer(tmp_path):
    base = published_folder(tmp_path / "base", OpenVLA)
    policy = OpenVLA.load(base)
    learned_adapter(policy, tmp_path / "adapter")
    next(base.glob("proprio_projector--*")).unlink()
    with pytest.raises(PerennialError, match=r"updates proprio_projector\.fc1\.weight of shape \[32, 3\], .* missing"):
        merge_checkpoints(base, tmp_path / "adapter", tmp_path / "merged")


def test_modules_in_files_of_their_own_need_room_too(tmp_path, monkeypatch):
    base = published_folder(tmp_path / "base", OpenVLAOFTL1)
    size = sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(PerennialError, match=r"needs .* GB, but .* free"):
        merge_checkpoints(base, base, tmp_path / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    merge_checkpoints(base, base, tmp_path / "merged")


@pytest.mark.parametrize("changed", ["vision_backbone.featurizer.blocks.0.attn.qkv", "lm_head", "proprio_projector"])
def test_an_adapter_of_other_weights_of_a_published_openvla_is_refused(changed, tmp_path):
    base = published_folder(tmp_path / "base", OpenVLAOFTL1)
    learned_adapter(OpenVLAOFTL1.load(base), tmp_path / "adapter")
    merge_checkpoints(base, tmp_path / "adapter", tmp_path / "merged")
    hits = 0
    for file in sorted(base.glob("*.safetensors")):
        tensors = load_file(file)
        for name in (n for n in tensors if changed in f"{file.name}/{n}" and n.endswith("weight")):
            hits += 1
            tensors[name] *= 1.1
        save_file(tensors, file, metadata={"format": "pt"})
    assert hits
    with pytest.raises(PerennialError, match=r"adapter was trained on other weights \(published\) than those in"):
        merge_checkpoints(base, tmp_path / "adapter", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("kind", "make", "published_as"),
    [("pi0", tiny_policy, published), ("smolvla", tiny_smolvla.tiny_policy, "model.{}".format)],
)
def test_a_learned_adapter_is_folded_into_lerobots_layout(kind, make, published_as, tmp_path):
    policy, base = make(), tmp_path / "base"
    base.mkdir()
    tensors = {published_as(name): weight.contiguous() for name, weight in policy.acting_weights().items()}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"type": kind}))
    learned_adapter(policy, tmp_path / "adapter")
    merge_checkpoints(base, tmp_path / "adapter", tmp_path / "merged", alpha=1.0)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in policy.acting_weights().items():
        torch.testing.assert_close(found[published_as(name)], weight, rtol=1e-6, atol=1e-6, msg=name)
    assert any(not torch.equal(found[name], tensors[name]) for name in found)
    with pytest.raises(PerennialError, match="was trained on other weights"):
        merge_checkpoints(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")


@pytest.mark.parametrize("kind", [OpenVLA, OpenVLAOFTL1])
def test_published_openvla_checkpoints_are_merged_by_group_with_their_heads_beside(kind, tmp_path):
    folders = [published_folder(tmp_path / str(seed), kind, seed) for seed in (0, 1)]
    report = merge_checkpoints(*folders, tmp_path / "merged", alpha_by_group=SHARES)
    assert set(report.tensors_by_group) == set(SHARES)
    first, second, merged = (kind.load(folder) for folder in (*folders, tmp_path / "merged"))
    expected = in_between(first.model.state_dict(), second.model.state_dict(), first.groups)
    found = merged.model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6, msg=name)
    next(folders[1].glob("proprio_projector--*")).unlink()
    with pytest.raises(PerennialError, match=r"has no file proprio_projector--\*\.safetensors, but another"):
        merge_checkpoints(*folders, tmp_path / "again", alpha_by_group=SHARES)


def test_lerobots_pi0_checkpoints_are_merged_by_group(tmp_path):
    policies = [tiny_policy(seed) for seed in (0, 1)]
    for number, policy in enumerate(policies):
        (tmp_path / str(number)).mkdir()
        tensors = {published(name): weight.contiguous() for name, weight in policy.acting_weights().items()}
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
    report = merge_checkpoints(tmp_path / "0", tmp_path / "1", tmp_path / "merged", alpha_by_group=SHARES)
    assert set(report.tensors_by_group) == set(SHARES)
    first, second = (policy.acting_weights() for policy in policies)
    expected = in_between(first, second, policies[0].groups)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == {published(name) for name in expected}
    for name, weight in expected.items():
        torch.testing.assert_close(found[published(name)], weight, rtol=1e-6, atol=1e-6, msg=name)
