import dataclasses

import numpy as np
import pytest
import torch

from perennial.errors import PerennialError
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.l2 import L2
from perennial.strategies.slca import SLCA
from strategies.worlds import TASKS, batch, log_softmax, policy, shake


def gradients(learner, loss):
    return dict(zip(learner.trainable(), torch.autograd.grad(loss, learner.trainable().values()), strict=True))


@pytest.mark.parametrize("adapter", [False, True])
def test_l2_is_half_the_squared_distance_to_the_start_of_the_task(adapter):
    learner, l2 = policy(adapter), L2(coefficient=0.6)
    for seed in range(2):
        l2.before_task(TASKS["left"], learner)
        start = {name: p.detach().clone() for name, p in learner.trainable().items()}
        assert float(l2.penalty(learner).detach()) == 0
        shake(learner, seed)
        penalty = l2.penalty(learner)
        distance = sum(float(((p - start[n]) ** 2).sum().detach()) for n, p in learner.trainable().items())
        assert float(penalty.detach()) == pytest.approx(0.3 * distance, rel=1e-4)
        for name, gradient in gradients(learner, penalty).items():
            torch.testing.assert_close(gradient, 0.6 * (learner.trainable()[name].detach() - start[name]))


@pytest.mark.parametrize("anchor", ["base", "previous"])
def test_the_anchor_is_the_base_or_the_previous_policy(anchor):
    learner, l2, kl = policy(), L2(coefficient=2.0, anchor=anchor), KLAnchor(coefficient=1.0, anchor=anchor)
    starts = []
    for seed in range(2):
        starts.append({name: p.detach().clone() for name, p in learner.trainable().items()})
        l2.before_task(TASKS["left"], learner)
        kl.before_task(TASKS["left"], learner)
        shake(learner, seed)
    reference = starts[0] if anchor == "base" else starts[1]
    expected = sum(float(((p - reference[n]) ** 2).sum().detach()) for n, p in learner.trainable().items())
    assert float(l2.penalty(learner).detach()) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(kl.teacher[name], reference[name]) for name in reference)


@pytest.mark.parametrize("adapter", [False, True])
def test_kl_is_the_forward_divergence_from_the_teacher(adapter):
    learner, teacher, kl = policy(adapter), policy(), KLAnchor(coefficient=0.7)
    kl.before_task(TASKS["left"], learner)
    rows = dataclasses.replace(batch(6), temperature=1.6)
    assert float(kl.batch_loss(learner.outputs(rows), rows).detach()) == pytest.approx(0, abs=1e-6)
    shake(learner, seed=0)
    old = log_softmax(teacher.logits(rows).detach().double().numpy() / 1.6)
    new = log_softmax(learner.logits(rows).detach().double().numpy() / 1.6)
    expected = 0.7 * (np.exp(old) * (old - new)).sum(-1)[rows.mask].mean()
    assert expected > 0.001
    assert float(kl.batch_loss(learner.outputs(rows), rows).detach()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_policy_that_is_its_own_teacher_is_not_pushed(adapter, seed):
    """Adam divides by the size of a gradient, so that rounding noise would move the policy as much as a signal."""
    learner, kl, rows = policy(adapter), KLAnchor(coefficient=0.7), batch(6)
    shake(learner, seed)
    kl.before_task(TASKS["left"], learner)
    loss = kl.batch_loss(learner.outputs(rows), rows)
    assert float(loss.detach()) == 0
    pulls = torch.autograd.grad(loss, learner.trainable().values(), allow_unused=True)
    assert all(pull is None or not pull.any() for pull in pulls)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_teacher_disturbs_neither_weights_nor_graphs(adapter):
    learner, kl, rows = policy(adapter), KLAnchor(coefficient=0.7), batch(6)
    learner.add_value_head(0)
    kl.before_task(TASKS["left"], learner)
    shake(learner, seed=0)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    loss = learner.logits(rows).square().mean()
    penalty = kl.batch_loss(learner.outputs(rows), rows)
    together = gradients(learner, loss + penalty + learner.value(rows).sum())
    alone = gradients(learner, learner.logits(rows).square().mean() + learner.value(rows).sum())
    pulls = torch.autograd.grad(
        kl.batch_loss(learner.outputs(rows), rows), learner.trainable().values(), allow_unused=True
    )
    for (name, gradient), pull in zip(alone.items(), pulls, strict=True):
        torch.testing.assert_close(together[name], gradient if pull is None else gradient + pull)
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


@pytest.mark.parametrize("kind", [L2, KLAnchor])
def test_negative_coefficients_are_refused(kind):
    with pytest.raises(PerennialError, match=f"{kind.name}.coefficient"):
        kind(coefficient=-0.1)


@pytest.mark.parametrize("adapter", [False, True])
def test_slca_scales_the_learning_rate_by_part_of_the_policy(adapter):
    learner = policy(adapter)
    groups = SLCA(vision=0.1, language=0.3, action=2.0).parameter_groups(learner)
    scale = {name: group.scale for group in groups for name in group.parameters}
    assert scale.keys() == learner.trainable().keys()
    expected = {"vision": 0.1, "language": 0.3, "state": 2.0, "trunk": 2.0, "head": 2.0}
    for name, value in scale.items():
        layer = next(layer for layer in expected if f"{layer}." in name)
        assert value == expected[layer]
    by_name = dict(learner.model.named_parameters())
    assert all(p is by_name[name] for group in groups for name, p in group.parameters.items())


def test_slca_refuses_negative_scales():
    with pytest.raises(PerennialError, match="at least 0"):
        SLCA(vision=-0.1)
