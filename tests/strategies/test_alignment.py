from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from perennial.config import validate
from perennial.errors import PerennialError
from perennial.policies.base import Batch, Observation
from perennial.policies.lora import LoRA, add_adapter
from perennial.randomness import stream
from perennial.strategies.alignment import Alignment, Gaussians, align, measure
from perennial.strategies.composition import Strategies
from perennial.testing.policy_conformance import example_observation
from perennial.testing.strategy_conformance import TASKS, Run
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import toy_config

WIDTH = 36  # 32 hidden numbers and 4 tokens


class Reader(ToyPolicy):
    """Hands on the features that it is given as states."""

    def features(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(batch.observation.states)


def test_the_moments_are_those_of_the_unmasked_tokens():
    rng = stream(0, "features")
    features = (rng.normal(size=(200, 4, 5)) @ rng.normal(size=(5, 5)) + 1).astype(np.float32)
    sample, mask = rng.integers(2, 6, (200, 4)), rng.random((200, 4)) < 0.7
    sample[~mask] = 8
    observation = Observation(np.zeros((200, 1, 8, 8, 3), np.uint8), ("go",) * 200, features)
    found = measure(Reader(), Batch(observation, sample, mask))
    within = np.zeros((5, 5))
    for name in range(9):
        own = features[mask & (sample == name)].astype(np.float64)
        assert found.counts[name] == len(own)
        assert (len(own) > 0) == (2 <= name < 6)
        if len(own):
            np.testing.assert_allclose(found.means[name], own.mean(0), rtol=1e-4, atol=1e-5)
            within += (own - own.mean(0)).T @ (own - own.mean(0))
    np.testing.assert_allclose(found.factor @ found.factor.T, within / (mask.sum() - 4), rtol=1e-3, atol=1e-4)


def test_samples_have_the_moments_and_the_shares():
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    means = torch.tensor([[0.0, 5.0], [9.0, 9.0], [-4.0, 1.0]])
    known = Gaussians(torch.tensor([1.0, 0.0, 3.0]), means, factor)
    features, bins = known.sample(stream(0, "draw"), 20_000)
    assert (bins == 2).float().mean() == pytest.approx(0.75, abs=0.02)
    for name in (0, 2):
        own = features[bins == name].double().numpy()
        np.testing.assert_allclose(own.mean(0), means[name], atol=0.12)
        np.testing.assert_allclose(np.cov(own.T), factor @ factor.T, atol=0.2)


def confused():
    """A policy with an adapter, and a task in which it takes each of two bins for the other."""
    policy = ToyPolicy(seed=3)
    add_adapter(policy, LoRA(rank=4, alpha=4), seed=1)
    features = policy.features(Batch(example_observation(8, 2), np.zeros((6, 4), np.int64), np.ones((6, 4), bool)))
    seen = policy.classify(features).argmax(-1).flatten()
    first, second = seen[0], next(bin for bin in seen if bin != seen[0])
    means = torch.zeros(9, WIDTH)
    means[second] = features.flatten(0, 1)[seen == first][0]
    means[first] = features.flatten(0, 1)[seen == second][0]
    counts = torch.zeros(9).index_fill(0, torch.stack([first, second]), 1.0)
    return policy, Gaussians(counts, means.detach(), 0.01 * torch.eye(WIDTH))


def loss(policy, known):
    bins = known.counts.nonzero().flatten()
    with torch.no_grad():
        return functional.cross_entropy(policy.classify(known.means[bins]), bins).item()


def test_alignment_teaches_the_classifier_and_nothing_else():
    policy, known = confused()
    before, at_first = {name: p.detach().clone() for name, p in policy.trainable().items()}, loss(policy, known)
    align(policy, {"task": known}, stream(0, "align"), steps=200, size=64, rate=0.05)
    bins = known.counts.nonzero().flatten()
    assert policy.classify(known.means[bins]).argmax(-1).tolist() == bins.tolist()
    assert loss(policy, known) < at_first / 2
    moved = {name for name, p in policy.trainable().items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".head." in name}
    assert all(parameter.grad is None for parameter in policy.trainable().values())


def test_a_step_is_that_of_normalised_logits_at_temperature_a_tenth():
    """The published loss, in NumPy, by finite differences along the step that plain gradient descent takes."""
    policy, known = confused()
    known = replace(known, factor=torch.zeros(WIDTH, WIDTH))
    head = next(p for name, p in policy.trainable().items() if ".head." in name and "lora_B" in name)
    before = head.detach().clone()

    def published(weights):
        with torch.no_grad():
            head.copy_(weights)
            logits = policy.classify(known.means[bins]).double().numpy()
        unit = logits / np.linalg.norm(logits, axis=1, keepdims=True) / 0.1
        return float(np.mean(np.log(np.exp(unit).sum(1)) - unit[np.arange(len(unit)), bins.numpy()]))

    bins = torch.from_numpy(stream(0, "one").choice(9, 8, p=(known.counts / 2).double().numpy()))
    align(policy, {"task": known}, stream(0, "one"), steps=1, size=8, rate=1e-2)
    step = (head.detach() - before) / -1e-2
    slope = (published(before + 1e-3 * step) - published(before - 1e-3 * step)) / 2e-3
    assert slope == pytest.approx(float((step**2).sum()), rel=0.02)


def guarded(*members):
    return Run(Strategies(members), adapter=True, learning="grpo")


def test_the_first_task_is_left_alone_and_later_ones_are_aligned():
    plain, aligned = guarded(), guarded(Alignment(steps=5))
    for run in (plain, aligned):
        run.teach(TASKS[0])
    same = [torch.equal(a, b) for a, b in zip(plain.weights().values(), aligned.weights().values(), strict=True)]
    assert all(same)
    (strategy,) = aligned.strategies.members
    assert list(strategy.known) == [TASKS[0].name]
    for run in (plain, aligned):
        run.teach(TASKS[1])
    ours, theirs = aligned.policy.trainable(), plain.policy.trainable()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {n for n in ours if ".head." in n}
    assert list(strategy.known) == [TASKS[0].name, TASKS[1].name]


def test_a_task_without_success_is_neither_remembered_nor_aligned_to():
    run = guarded(Alignment(steps=5))
    (strategy,) = run.strategies.members
    run.teach(TASKS[0])
    before = {name: p.detach().clone() for name, p in run.policy.trainable().items()}

    def failed(count):
        return [replace(played, success=False) for played in run.play(TASKS[1], count, "failed", 0)]

    strategy.after_task(TASKS[1], run.policy, failed)
    strategy.remember(TASKS[1], run.policy, failed)
    assert list(strategy.known) == [TASKS[0].name]
    assert all(torch.equal(p, before[name]) for name, p in run.policy.trainable().items())


def test_a_policy_without_a_classifier_is_refused(toy_checkpoint):
    config = toy_config(toy_checkpoint, strategies=(Alignment(),))
    assert validate(config) is config
    with pytest.raises(PerennialError, match=r"'alignment' needs `classify`, which the policy 'pi0' does not have"):
        validate(replace(config, policy=replace(config.policy, name="pi0")))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"episodes": -1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(PerennialError, match=rf"alignment.{next(iter(wrong))} is .*; it must be above 0"):
        Alignment(**wrong)
