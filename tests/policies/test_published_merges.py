"""Merging published checkpoints by group: what is loaded from the result, against the groups of the policy."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pi0_checkpoint import published
from tiny_pi0 import tiny_policy

from perennial.errors import PerennialError
from perennial.merging.checkpoints import merge_checkpoints
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft_l1 import OpenVLAOFTL1
from perennial.randomness import stream
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint

SHARES = {"vision": 0.0, "language": 0.5, "action": 1.0}
HEAD = {"layer_norm1": 96, "fc1": (32, 96), "layer_norm2": 32, "fc2": (3, 32)}
BLOCKS = {f"mlp_resnet_blocks.{i}.ffn.{j}": size for i in (0, 1) for j, size in ((0, 32), (1, (32, 32)))}
PROPRIO = {"fc1": (32, 3), "fc2": (32, 32)}


def in_between(first, second, groups):
    """What `SHARES` makes of two state dicts."""
    of_name = {name: SHARES[group] for group, names in groups.items() for name in names}
    return {name: torch.lerp(first[name], second[name], of_name[name]) for name in first}


def write_module(path, sizes, prefix, seed):
    tensors = {}
    for name, size in sizes.items():
        for kind, shape in (("weight", size), ("bias", size if isinstance(size, int) else size[0])):
            numbers = stream(seed, "module", name, kind).standard_normal(shape, dtype="float32")
            tensors[f"{prefix}{name}.{kind}"] = torch.from_numpy(numbers)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", [OpenVLA, OpenVLAOFTL1])
def test_published_openvla_checkpoints_are_merged_by_group_with_their_heads_beside(kind, tmp_path):
    folders = []
    for seed in (0, 1):
        settings = {"chunk": 2, "use_proprio": True, "layout": "official"}
        folder = write_openvla_checkpoint(tmp_path / str(seed), settings=settings, dtype=torch.float32, seed=seed)
        step = f"--{seed}0000_checkpoint.safetensors"
        write_module(folder / f"proprio_projector{step}", PROPRIO, "module.", seed)
        if kind is OpenVLAOFTL1:
            write_module(folder / f"action_head{step}", HEAD | BLOCKS, "module.model.", seed)
        folders.append(folder)
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
