import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from perennial.errors import LearningError
from perennial.learning.base import gradient_step
from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.strategies.base import Strategy
from perennial.strategies.composition import Strategies
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ewc import EWC
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.l2 import L2
from perennial.strategies.replay import Replay
from perennial.testing.toy import ToyPolicy, ToySuite

TASKS = ToySuite.tasks


class Anchor(Strategy):
    """A penalty on the weights and a loss that is a mean over the rows; notes how often it was asked for the first."""

    name = "anchor"
    asked = 0

    def penalty(self, policy):
        self.asked += 1
        return 0.03 * sum((p**2).sum() for p in policy.trainable().values())

    def batch_loss(self, outputs, whole):
        return 0.5 * outputs.logits.square().mean((1, 2)).sum() / len(whole)


class Rehearsal(Strategy):
    """Replays the first rows of a batch and notes how many it was asked for, and how many at a time."""

    name = "rehearsal"

    def __init__(self, memory):
        self.memory, self.asked, self.passes = memory, [], []

    def replay(self, rng, size):
        self.asked.append(size)
        return self.memory.take(np.arange(5))

    def replay_loss(self, outputs, whole):
        self.passes.append(len(outputs.batch))
        return 0.7 * outputs.imitation_loss.sum() / len(whole)


def step(policy, batch, loss, members=(), micro_batch=10_000, **settings):
    config = AdamWConfig(**{"learning_rate": 0.0, "max_grad_norm": float("inf")} | settings, micro_batch=micro_batch)
    strategies = Strategies(tuple(members))
    optimizer = build_optimizer(policy, strategies, config)
    metrics = gradient_step(policy, batch, loss, strategies, optimizer, config, np.random.default_rng(0))
    return metrics, gradients(policy)


def gradients(policy):
    every = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable().values()]
    return np.concatenate([g.flatten().numpy().copy() for g in every])


@pytest.fixture
def weighted(precise, played):
    return weighted_batch(precise, played)[0]


@pytest.mark.parametrize("micro_batch", [1, 7, 16])
def test_micro_batches_add_up_to_the_whole(precise, weighted, micro_batch):
    members = (Anchor(), Rehearsal(weighted))
    whole, expected = step(precise, weighted, GRPO().loss, members)
    split, gradient = step(precise, weighted, GRPO().loss, members, micro_batch)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)
    assert split == pytest.approx(whole, rel=1e-9)
    assert members[1].asked == [len(weighted)] * 2
    assert members[0].asked == 2, "once per optimiser step"


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_springs_pull_the_same_in_any_number_of_micro_batches(precise, weighted, parts):
    """Beside a loss without gradient, it is theirs: c F (theta - theta*) of EWC and c (theta - theta*) of L2."""
    ewc, l2 = EWC(coefficient=0.3), L2(coefficient=0.2)
    start = {name: p.detach().clone() for name, p in precise.trainable().items()}
    ewc.fisher = {name: torch.full_like(p, 1.0 + i) for i, (name, p) in enumerate(start.items())}
    for member in (ewc, l2):
        member.before_task(TASKS["left"], precise)
    with torch.no_grad():
        for p in precise.trainable().values():
            p.add_(0.1 * p + 0.01)
    metrics, gradient = step(precise, weighted, no_loss, (ewc, l2), math.ceil(len(weighted) / parts))
    moved = {name: p.detach() - start[name] for name, p in precise.trainable().items()}
    pull = [((0.3 * ewc.fisher[name] + 0.2) * by).flatten().numpy() for name, by in moved.items()]
    np.testing.assert_allclose(gradient, np.concatenate(pull), rtol=1e-12)
    energy = [((0.15 * ewc.fisher[name] + 0.1) * by**2).sum() for name, by in moved.items()]
    assert metrics["penalty"] == pytest.approx(float(sum(energy)), rel=1e-12)


def test_kl_in_micro_batches_adds_up_to_the_whole(precise, weighted):
    assert len(set(weighted.mask.sum(1))) > 1, "rows of equal weight would show nothing"
    kl = KLAnchor(coefficient=0.5)
    kl.before_task(TASKS["left"], precise)
    with torch.no_grad():
        precise.model.head.weight.mul_(1.3)
    looks = []
    precise.model.register_forward_hook(lambda *_: looks.append(torch.is_grad_enabled()))
    whole, expected = step(precise, weighted, GRPO().loss, (kl,))
    assert looks == [True, False], "the update's own forward pass, and the teacher's"
    split, gradient = step(precise, weighted, GRPO().loss, (kl,), micro_batch=3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)
    assert split == pytest.approx(whole, rel=1e-9)


def test_what_is_replayed_is_passed_in_micro_batches_too(precise, weighted):
    rehearsal = Rehearsal(weighted)
    step(precise, weighted, GRPO().loss, (rehearsal,), micro_batch=2)
    assert rehearsal.passes == [2, 2, 1]


@pytest.mark.parametrize("kept", [Replay(coefficient=0.3), DarkReplay(coefficient=0.3, label_coefficient=0.7)])
def test_replay_in_micro_batches_adds_up_to_the_whole(precise, weighted, played, kept):
    kept = replace(kept, capacity=11)
    kept.remember(TASKS["left"], precise, lambda count: [t for t in played if t.success])
    with torch.no_grad():
        precise.model.head.weight.mul_(1.3)
    assert len(set(kept.memories["left"].mask.sum(1))) == 2, "rows of equal weight would show nothing"
    whole, expected = step(precise, weighted, GRPO().loss, (kept,))
    split, gradient = step(precise, weighted, GRPO().loss, (kept,), micro_batch=3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    assert split == pytest.approx(whole, rel=1e-6)


def test_loss_penalty_and_replay_add_up(precise, weighted):
    _, plain = step(precise, weighted, GRPO().loss)
    metrics, everything = step(precise, weighted, GRPO().loss, (Anchor(), Rehearsal(weighted)))
    anchor = Anchor()
    extra = anchor.penalty(precise) + anchor.batch_loss(precise.outputs(weighted), weighted)
    extra = extra + 0.7 * precise.imitation_loss(weighted.take(np.arange(5))).mean()
    assert metrics["penalty"] == pytest.approx(float(extra.detach()), rel=1e-9)
    for parameter in precise.trainable().values():
        parameter.grad = None
    extra.backward()
    np.testing.assert_allclose(everything, plain + gradients(precise), rtol=1e-9, atol=1e-14)


def test_the_reported_norm_is_that_before_clipping(precise, weighted):
    free, gradient = step(precise, weighted, GRPO().loss)
    clipped, smaller = step(precise, weighted, GRPO().loss, max_grad_norm=0.01)
    assert clipped["grad_norm"] == free["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-9)
    np.testing.assert_allclose(smaller, gradient * 0.01 / np.linalg.norm(gradient), rtol=1e-3)


def no_loss(outputs):
    return outputs.log_prob.sum() * 0, {}


def spoilt_loss(outputs):
    total, figures = GRPO().loss(outputs)
    return total * float("nan"), figures


def infinite_gradient(outputs):
    zero = outputs.policy.trainable()["head.bias"].sum() * 0
    return zero.sqrt(), {}


class Spoilt(Strategy):
    name = "spoilt"

    def penalty(self, policy):
        return policy.trainable()["head.bias"].sum() * float("inf")


@pytest.mark.parametrize(
    ("loss", "members"),
    [(spoilt_loss, ()), (infinite_gradient, ()), (GRPO().loss, (Spoilt(),))],
    ids=["loss", "gradient", "penalty"],
)
def test_nan_is_an_error_and_leaves_the_weights_alone(played, loss, members):
    policy = ToyPolicy()
    batch, _ = weighted_batch(policy, played)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with pytest.raises(LearningError, match=r"not-a-number .*; start a new run with a lower learning rate\.") as raised:
        step(policy, batch, loss, members, learning_rate=0.1, warmup_steps=0)
    assert raised.value.exit_code == 3
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_nan_in_one_row_is_found_wherever_its_micro_batch_is(played):
    policy = ToyPolicy()
    batch, _ = weighted_batch(policy, played)
    spoilt = batch.log_prob.copy()
    spoilt[-1, 0] = np.nan
    with pytest.raises(LearningError):
        step(policy, replace(batch, log_prob=spoilt), GRPO().loss, micro_batch=4)
