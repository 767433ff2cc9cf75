from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pi0 import tiny_policy

from perennial.config import validate
from perennial.errors import PerennialError
from perennial.policies._placement import check_placement, load_policy, recompute_blocks
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.rollout.workers import Cast, InlineWorkers, WorkerConfig
from perennial.session import prepare
from perennial.storage.run_folder import RunFolder
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import example_observation
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import toy_config

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("device", ["gpu", "meta", "mps"])
def test_devices_are_cpu_and_cuda(device):
    with pytest.raises(PerennialError, match=f"device is '{device}', but it must be cpu, cuda or cuda:<number>"):
        check_placement(device, None)


@without_gpu
def test_a_missing_gpu_is_said_before_anything_is_loaded(toy_checkpoint):
    config = toy_config(toy_checkpoint)
    with pytest.raises(PerennialError, match=r"device is 'cuda', but torch .* finds no GPU here"):
        validate(replace(config, policy=replace(config.policy, device="cuda")))


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    check_placement("cuda", "float32")
    with pytest.raises(PerennialError, match=r"Tesla V100 does not compute in bfloat16.*dtype float32"):
        check_placement("cuda:0", "bfloat16")


def test_what_the_checkpoint_asks_for_is_checked_too(tmp_path, monkeypatch):
    folder = write_openvla_checkpoint(tmp_path / "openvla", settings={"chunk": 2, "dtype": "bfloat16"})
    seen = []
    monkeypatch.setattr("perennial.policies._placement.check_placement", lambda *asked: seen.append(asked))
    load_policy("openvla_oft", folder)
    assert seen == [("cpu", None), ("cpu", "bfloat16")]


def test_a_checkpoint_of_another_family_is_named(tmp_path):
    tiny_policy().save(tmp_path / "pi0")
    openvla = write_openvla_checkpoint(tmp_path / "openvla")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    for name, folder, sentence in (
        ("openvla_oft", "pi0", "checkpoint of 'pi0', which openvla_oft cannot read; set --policy.name pi0"),
        ("openvla", "pi0", "checkpoint of 'pi0', which openvla cannot read"),
        ("smolvla", "pi0", "checkpoint of 'pi0', which smolvla cannot read"),
        ("pi0", openvla.name, "checkpoint of 'openvla', which pi0 cannot read; set --policy.name openvla"),
        ("openvla_oft", "none", "describes no policy; choose a checkpoint of openvla_oft"),
    ):
        with pytest.raises(PerennialError, match=sentence):
            load_policy(name, tmp_path / folder)


def test_only_policies_with_blocks_can_recompute(toy_checkpoint):
    config = toy_config(toy_checkpoint)
    with pytest.raises(PerennialError, match=r"cannot recompute activations; set --policy\.checkpointing false"):
        validate(replace(config, policy=replace(config.policy, checkpointing=True)))


def test_pi0_can_be_loaded_in_half(tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path)
    assert {p.dtype for p in load_policy("pi0", tmp_path).model.parameters()} == {torch.float32}
    half = load_policy("pi0", tmp_path, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    observation = example_observation(image_size=16, state_dim=3)
    full, rounded = (p.act(observation, 0.0, [None] * 6).actions for p in (policy, half))
    np.testing.assert_allclose(rounded, full, atol=0.3)
    assert (rounded != full).any()


def test_acting_runs_no_block_twice():
    policy, runs = tiny_policy(), []
    for block in policy.blocks():
        block.register_forward_hook(lambda *_: runs.append(1))
    observation = example_observation(image_size=16, state_dim=3)
    plain = policy.act(observation, 0.0, [None] * 6).actions
    count = len(runs)
    recompute_blocks(policy)
    np.testing.assert_array_equal(policy.act(observation, 0.0, [None] * 6).actions, plain)
    assert len(runs) == 2 * count


def test_workers_act_in_the_chosen_type(tmp_path):
    folder = write_openvla_checkpoint(tmp_path / "openvla", settings={"chunk": 2})
    cast = Cast("perennial.testing.toy", "openvla_oft", folder, 0, dtype="bfloat16")
    weights = OpenVLAOFT.load(folder, torch.bfloat16).acting_weights()
    workers = InlineWorkers(WorkerConfig("inline"), cast, weights)
    assert {p.dtype for p in workers._policy.model.parameters()} == {torch.bfloat16}


class StoppedError(Exception):
    pass


def test_a_run_places_its_policy_as_chosen(toy_checkpoint, tmp_path, monkeypatch):
    """The learner and those who act get the choice; blocks are recomputed where asked."""
    seen = {}

    def load(*choice):
        seen["learner"] = choice[2:]
        return ToyPolicy.load(toy_checkpoint)

    def start(config, cast, policy):
        seen["actors"] = (cast.device, cast.dtype)
        raise StoppedError

    monkeypatch.setattr("perennial.session.load_policy", load)
    monkeypatch.setattr("perennial.session.start_beside", start)
    monkeypatch.setattr("perennial.session.recompute_blocks", lambda policy: seen.setdefault("recomputed", policy))
    config = toy_config(toy_checkpoint)
    config = replace(config, policy=replace(config.policy, dtype="bfloat16", checkpointing=True))
    with ExitStack() as stack, pytest.raises(StoppedError):
        prepare(config, RunFolder.create(tmp_path / "run", "toy", {}, {}), stack)
    assert seen["learner"] == seen["actors"] == ("cpu", "bfloat16")
    assert isinstance(seen["recomputed"], ToyPolicy)
