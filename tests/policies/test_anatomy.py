"""Counts from a config alone against the networks themselves."""

from functools import partial

import pytest
import torch
from middle_policies import POLICIES, ROWS, anatomy_of, batch_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perennial.policies import _activations, _anatomy
from perennial.policies._anatomy import Learning
from perennial.policies._openvla import anatomy as openvla_anatomy
from perennial.policies._openvla.model import OpenVLAOFTModel
from perennial.policies._pi0 import anatomy as pi0_anatomy
from perennial.policies._pi0.model import PI0Network
from perennial.policies._placement import recompute_blocks
from perennial.policies._smolvla import anatomy as smolvla_anatomy
from perennial.policies._smolvla.model import SmolVLANetwork
from perennial.policies.lora import LoRA, add_adapter, set_trainable
from perennial.testing.memory import kept_for_backward


@pytest.mark.parametrize(
    ("make", "config", "describe"),
    [
        (OpenVLAOFTModel, openvla_anatomy.published_config(8), partial(openvla_anatomy.describe, one_by_one=False)),
        (partial(PI0Network.create, random=False), pi0_anatomy.published_config(), pi0_anatomy.describe),
        (SmolVLANetwork, smolvla_anatomy.published_config(), smolvla_anatomy.describe),
    ],
    ids=["openvla", "pi0", "smolvla"],
)
def test_the_published_models_have_as_many_parameters_as_on_the_meta_device(make, config, describe):
    with torch.device("meta"):
        model = make(config)
    anatomy = describe(config, prompt=30, dtype="bfloat16")
    assert _anatomy.parameters(anatomy) == sum(p.numel() for p in model.parameters())
    linear = {id(m.weight): sum(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert _anatomy.adapter_parameters(anatomy, Learning(32)) == 32 * sum(linear.values())


@pytest.mark.parametrize("name", POLICIES)
def test_arithmetic_is_that_of_torchs_own_counter(name, tmp_path):
    policy = POLICIES[name]()
    anatomy, batch = anatomy_of(policy, tmp_path), batch_of(policy)
    assert _anatomy.parameters(anatomy) == sum(p.numel() for p in policy.model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.act(batch.observation, 0.0, [None] * ROWS)
    assert ROWS * _anatomy.acting_operations(anatomy) == pytest.approx(counter.get_total_flops(), rel=0.03)
    for rank in (2, None):
        learner = POLICIES[name]()
        if rank:
            add_adapter(learner, LoRA(rank=rank), 0)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            learner.log_prob(batch).sum().backward()
        expected = ROWS * _anatomy.update_operations(anatomy, Learning(rank))
        assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "rank", "groups"),
    [
        ("openvla_oft", 2, ("action",)),
        ("openvla_oft", None, ("language",)),
        ("openvla_oft", 2, ("vision", "action")),
        ("pi0", None, ("action",)),
        ("pi0", 2, ("vision",)),
        ("smolvla", None, ("action",)),
        ("smolvla", 2, ("vision",)),
    ],
)
def test_frozen_groups_cost_no_more_than_they_have_to(name, groups, rank, tmp_path):
    """Operations of torch's counter and what autograd keeps, where the gradient ends early or only passes through."""
    policy = POLICIES[name]()
    anatomy, batch = anatomy_of(policy, tmp_path), batch_of(policy)
    if rank:
        add_adapter(policy, LoRA(rank=rank), 0)
    set_trainable(policy, groups)
    learning = Learning(rank, groups=groups)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.log_prob(batch).sum().backward()
    expected = ROWS * _anatomy.update_operations(anatomy, learning)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    with kept_for_backward() as sizes:
        log_prob = policy.log_prob(batch)
    measured = sum(size for address, size in sizes.items() if address not in weights)
    assert ROWS * _activations.kept(anatomy, learning) == pytest.approx(measured, rel=0.15), log_prob.shape
    learned = sum(parameter.numel() for parameter in policy.trainable().values())
    counted = _anatomy.adapter_parameters(anatomy, learning, groups) if rank else _anatomy.parameters(anatomy, groups)
    assert counted == pytest.approx(learned, rel=0.01)


@pytest.mark.parametrize(
    ("rank", "dtype", "recompute"),
    [
        (8, torch.float32, False),
        (8, torch.bfloat16, True),
        (None, torch.float32, True),
        (None, torch.bfloat16, False),
    ],
)
@pytest.mark.parametrize("name", POLICIES)
def test_what_the_update_keeps_is_what_autograd_keeps(name, rank, dtype, recompute, tmp_path):
    policy = POLICIES[name]()
    anatomy, batch = anatomy_of(policy, tmp_path), batch_of(policy)
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)
    if rank:
        add_adapter(policy, LoRA(rank=rank), 0)
    else:
        set_trainable(policy)
    if recompute:
        recompute_blocks(policy)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    with kept_for_backward() as sizes:
        log_prob = policy.log_prob(batch)
    measured = sum(size for address, size in sizes.items() if address not in weights)
    estimated = ROWS * _activations.kept(anatomy, Learning(rank, bytes=dtype.itemsize, recompute=recompute))
    assert estimated == pytest.approx(measured, rel=0.12), log_prob.shape
