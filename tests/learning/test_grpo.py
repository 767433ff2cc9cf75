"""GRPO against a second implementation in NumPy, written from the formulas of arXiv 2603.11653."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.learning.stage import learn
from perennial.policies.base import Batch, Observation
from perennial.rollout.trajectory import to_batch
from perennial.rollout.workers import Cast, InlineWorkers, WorkerConfig
from perennial.strategies.composition import Strategies
from perennial.strategies.ewc import EWC
from perennial.strategies.kl_anchor import KLAnchor
from perennial.testing.toy import ToyPolicy, ToySuite

FREE = AdamWConfig(learning_rate=0.0, warmup_steps=0, max_grad_norm=float("inf"))
HORIZON = 10
TOKENS_PER_STEP = 2


class Recorder(torch.optim.SGD):
    """Keeps every gradient and makes no step."""

    def __init__(self, policy):
        super().__init__([{"params": list(policy.trainable().values()), "scale": 1.0}], lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.param_groups[0]["params"]]
        self.gradients.append(np.concatenate([g.flatten().numpy() for g in grads]))


def disturb(policy, size):
    """Move the weights away from those that acted, so that ratios leave 1 and some are clipped."""
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += size * torch.from_numpy(rng.normal(size=tuple(parameter.shape)))


def flat_gradient(loss, policy):
    """The gradient of `loss` in one vector; 0 where a parameter plays no part."""
    gradients = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True, materialize_grads=True)
    return np.concatenate([g.flatten().numpy() for g in gradients])


def update(objective, policy, trajectories, strategies=None):
    recorder = Recorder(policy)
    metrics = objective.update(policy, (), trajectories, strategies or Strategies(), recorder, np.random.default_rng(0))
    return metrics, recorder.gradients


def reference(policy, trajectories, low, high):
    """Loss, mean KL estimate and clipped share, one token after another in float64."""
    groups = {}
    for index, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.episode.group, []).append(index)
    advantage, informative = {}, set()
    for members in groups.values():
        returns = [float(trajectories[i].success) for i in members]
        mean = sum(returns) / len(returns)
        deviation = np.sqrt(sum((r - mean) ** 2 for r in returns) / (len(returns) - 1))
        for i, r in zip(members, returns, strict=True):
            advantage[i] = (r - mean) / (deviation + 1e-6)
            if deviation > 0:
                informative.add(i)
    loss, kl, clipped, tokens = 0.0, 0.0, 0, 0
    for i, trajectory in enumerate(trajectories):
        with torch.no_grad():
            new = policy.log_prob(to_batch([trajectory], policy.token_steps)).numpy()
        of_trajectory = []
        for decision, executed in enumerate(trajectory.steps):
            for token in range(TOKENS_PER_STEP * executed):
                log_ratio = float(new[decision, token]) - float(trajectory.log_probs[decision, token])
                ratio, a = np.exp(log_ratio), advantage[i]
                bounded = min(max(ratio, 1 - low), 1 + high)
                of_trajectory.append(-min(ratio * a, bounded * a))
                if i in informative:
                    tokens += 1
                    kl += ratio - 1 - log_ratio
                    clipped += bool((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))
        loss += sum(of_trajectory) / len(of_trajectory) / len(trajectories)
    return loss, kl / tokens, clipped / tokens


def full_batch_gradient(policy, trajectories, low, high):
    """The gradient with nothing left out: every trajectory padded to the horizon, all groups, all steps.

    The padded steps carry wild numbers, which only their mask of 0 keeps out of the gradient.
    """
    chunks = HORIZON // 2
    groups = np.array([t.episode.group for t in trajectories])
    returns = np.array([t.reward for t in trajectories])
    advantages = np.array(
        [
            (returns[i] - returns[groups == g].mean()) / (returns[groups == g].std(ddof=1) + 1e-6)
            for i, g in enumerate(groups)
        ]
    )
    total = torch.zeros((), dtype=torch.float64)
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        missing = chunks - len(trajectory.steps)
        executed = int(trajectory.steps.sum())
        rows = Batch(
            Observation(
                np.concatenate([trajectory.images, np.full((missing, 1, 8, 8, 3), 200, np.uint8)]),
                (trajectory.episode.instruction,) * chunks,
                np.concatenate([trajectory.states, np.full((missing, 2), 3.0, np.float32)]),
            ),
            sample=np.concatenate([trajectory.samples, np.full((missing, 4), 7)]),
            mask=np.ones((chunks, 4), bool),
        )
        old = np.concatenate([trajectory.log_probs, np.full((missing, 4), -2.0, np.float32)]).astype(np.float64)
        ratio = (policy.log_prob(rows) - torch.from_numpy(old)).exp().flatten()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        mask = torch.arange(chunks * 4) < TOKENS_PER_STEP * executed
        # Per-token loss x mask / (T_i / horizon), then the mean over all entries, masked ones included.
        total = total - (surrogate * mask / (executed / HORIZON)).sum()
    loss = total / (len(trajectories) * chunks * 4)
    gradients = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
    flat = [
        torch.zeros_like(p) if g is None else g for p, g in zip(policy.trainable().values(), gradients, strict=True)
    ]
    return float(loss.detach()), np.concatenate([g.flatten().numpy() for g in flat])


@pytest.mark.parametrize(
    ("low", "high", "size"), [(0.2, 0.28, 0.0), (0.2, 0.28, 0.1), (0.1, 0.4, 0.1), (0.02, 0.3, 0.3)]
)
def test_loss_kl_and_clip_fraction_equal_the_numpy_reference(precise, played, low, high, size):
    disturb(precise, size)
    objective = GRPO(clip_low=low, clip_high=high, epochs=1, minibatches=1, optimizer=FREE)
    metrics, _ = update(objective, precise, played)
    loss, kl, clipped = reference(precise, played, low, high)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-8)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert metrics["clip_fraction"] == clipped
    if size:
        assert kl > 1e-3
        assert 0.05 < clipped < 0.95


@pytest.mark.parametrize("size", [0.0, 0.05, 0.2])
def test_dropping_masked_steps_and_equal_groups_leaves_the_gradient_as_it_is(precise, played, size):
    disturb(precise, size)
    objective = GRPO(epochs=1, minibatches=1, optimizer=FREE)
    metrics, (gradient,) = update(objective, precise, played)
    loss, expected = full_batch_gradient(precise, played, objective.clip_low, objective.clip_high)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-8)
    # The saving is real: only the decisions of the four groups with unequal returns were looked at.
    informative = sum(len(t.steps) for t in played if t.episode.group >= 2)
    assert metrics["kept"] == informative / sum(len(t.steps) for t in played)


def kl_of(policy, batch, taught):
    """Mean over executed tokens of the divergence of `policy` from the log-probabilities `taught`."""
    student = policy.logits(batch).log_softmax(-1)
    return (taught.exp() * (taught - student)).sum(-1)[torch.from_numpy(batch.mask)].mean()


def test_a_strategy_that_looks_at_states_sees_those_of_groups_that_ended_alike(precise, played):
    kl = KLAnchor(coefficient=0.5)
    kl.before_task(ToySuite.tasks["left"], precise)
    teacher = copy.deepcopy(precise.model)
    disturb(precise, 0.1)
    objective = GRPO(epochs=1, minibatches=1, optimizer=FREE)
    plain, (without,) = update(objective, precise, played)
    metrics, (gradient,) = update(objective, precise, played, Strategies((kl,)))
    batch = to_batch(played, precise.token_steps)
    precise.model, own = teacher, precise.model
    with torch.no_grad():
        taught = precise.logits(batch).log_softmax(-1)
    precise.model = own
    divergence = kl_of(precise, batch, taught)
    loss, full = full_batch_gradient(precise, played, objective.clip_low, objective.clip_high)
    expected = full + 0.5 * flat_gradient(divergence, precise)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-8)
    assert metrics["penalty"] == pytest.approx(0.5 * float(divergence.detach()), rel=1e-6)
    assert metrics["kept"] == plain["kept"] < 1
    assert np.abs(gradient - without).max() > 1e-3
    # Where no group has anything to say, it still acts.
    alike = [replace(t, success=True) for t in played]
    metrics, (gradient,) = update(objective, precise, alike, Strategies((kl,)))
    expected = 0.5 * flat_gradient(kl_of(precise, batch, taught), precise)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    assert metrics["kept"] == 0
    idle = KLAnchor(coefficient=0.0)
    assert update(objective, precise, alike, Strategies((idle, EWC(variant="ut2026"))))[1] == []


@pytest.mark.parametrize("minibatches", [2, 4, 7])
def test_minibatch_gradients_average_to_the_full_gradient(precise, played, minibatches):
    disturb(precise, 0.1)
    _, (full,) = update(GRPO(epochs=1, minibatches=1, optimizer=FREE), precise, played)
    _, parts = update(GRPO(epochs=1, minibatches=minibatches, optimizer=FREE), precise, played)
    assert len(parts) == minibatches
    # Weights are float32, and so is their product with the number of minibatches.
    np.testing.assert_allclose(np.mean(parts, axis=0), full, rtol=1e-6, atol=1e-7 * np.abs(full).max())
    assert np.abs(parts[0] - full).max() > 0.1 * np.abs(full).max()


def test_every_epoch_passes_over_all_decisions_in_a_new_order(precise, played):
    disturb(precise, 0.1)
    _, parts = update(GRPO(epochs=2, minibatches=3, optimizer=FREE), precise, played)
    assert len(parts) == 6
    first, second = np.mean(parts[:3], axis=0), np.mean(parts[3:], axis=0)
    np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-12)
    assert not np.allclose(parts[0], parts[3])


def test_at_the_acting_weights_the_gradient_is_the_plain_policy_gradient(precise, played):
    metrics, (gradient,) = update(GRPO(epochs=1, minibatches=1, optimizer=FREE), precise, played)
    assert metrics["kl"] < 1e-10
    assert metrics["clip_fraction"] == 0
    batch, _ = weighted_batch(precise, played)
    objective = -(
        precise.log_prob(batch) * torch.from_numpy(batch.advantage)[:, None] * torch.from_numpy(batch.weight)
    ).sum()
    expected = torch.autograd.grad(objective, list(precise.trainable().values()), allow_unused=True)
    expected = [
        torch.zeros_like(p) if g is None else g for p, g in zip(precise.trainable().values(), expected, strict=True)
    ]
    # Acting was in float32, so ratios are 1 only up to its rounding.
    flat = np.concatenate([g.flatten().numpy() for g in expected])
    np.testing.assert_allclose(gradient, flat, rtol=1e-5, atol=1e-6 * np.abs(flat).max())


def test_every_trajectory_weighs_the_same_whatever_its_length(precise, played):
    batch, _ = weighted_batch(precise, played)
    used = [t for t in played if t.episode.group >= 2]
    assert len({int(t.steps.sum()) for t in used}) > 3
    owner = np.repeat(np.arange(len(used)), [len(t.steps) for t in used])
    sums = np.bincount(owner, weights=batch.weight.astype(np.float64).sum(1))
    np.testing.assert_allclose(sums, 1 / len(played), rtol=1e-6)
    assert not batch.weight[~batch.mask].any()
    assert (~batch.mask).any()


def test_what_happened_after_the_end_of_an_episode_counts_nothing(precise, played):
    disturb(precise, 0.1)
    changed = []
    for trajectory in played:
        unexecuted = precise.token_steps[None] >= trajectory.steps[:, None]
        changed.append(
            replace(
                trajectory,
                samples=np.where(unexecuted, 8 - trajectory.samples, trajectory.samples),
                log_probs=np.where(unexecuted, np.float32(-9), trajectory.log_probs),
            )
        )
    objective = GRPO(epochs=1, minibatches=1, optimizer=FREE)
    metrics, (gradient,) = update(objective, precise, played)
    other_metrics, (other,) = update(objective, precise, changed)
    np.testing.assert_allclose(other, gradient, rtol=1e-12, atol=1e-15)
    assert other_metrics == pytest.approx(metrics, rel=1e-12)


def test_without_a_difference_in_returns_nothing_is_learned(played):
    policy = ToyPolicy()
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    objective = GRPO(optimizer=AdamWConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.1))
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer)
    for success in (False, True):
        alike = [replace(t, success=success) for t in played]
        metrics = objective.update(policy, (), alike, Strategies(), optimizer, np.random.default_rng(0))
        assert metrics["kept"] == 0
        assert metrics["grad_norm"] == 0
    assert not optimizer.state
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_groups_are_dealt_to_tasks_states_and_words_in_turn():
    suite = ToySuite()
    tasks = (suite.tasks["left"], suite.tasks["up"])
    objective = GRPO(groups=6, group_size=2, initial_states=4, temperature=1.3)
    episodes = objective.episodes(tasks, ("train", 0, 0, 1))
    assert [e.task for e in episodes] == ["left", "left", "up", "up"] * 3
    assert [e.initial_state for e in episodes] == [3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1]
    for first, second in zip(episodes[::2], episodes[1::2], strict=True):
        assert (first.group, first.initial_state, first.instruction) == (
            second.group,
            second.initial_state,
            second.instruction,
        )
    assert {e.split for e in episodes} == {"training"}
    assert {e.temperature for e in episodes} == {1.3}
    everything = [e.key for number in range(3) for e in objective.episodes(tasks, ("train", 0, 0, number))]
    assert len(set(everything)) == len(everything)
    words = {e.instruction for number in range(3) for e in objective.episodes(tasks, ("train", 0, 0, number))}
    assert words == {*tasks[0].instructions, *tasks[1].instructions}


def test_tasks_get_the_same_number_of_groups_also_where_these_do_not_divide():
    suite = ToySuite()
    tasks = (suite.tasks["left"], suite.tasks["up"])
    objective = GRPO(groups=3, group_size=2, initial_states=9)
    episodes = [e for number in range(4) for e in objective.episodes(tasks, ("train", 0, 0, number))]
    for task in tasks:
        assert [e.initial_state for e in episodes[::2] if e.task == task.name] == [0, 1, 2, 3, 4, 5]


def train(checkpoint, objective, seed=0):
    """Learn "left" from `checkpoint`; the iterations and the policy."""
    policy, done = ToyPolicy.load(checkpoint), []
    workers = InlineWorkers(
        WorkerConfig("inline", slots=32),
        Cast("perennial.testing.toy", "perennial.testing.toy", checkpoint, seed),
        policy.acting_weights(),
    )
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer)
    learn(
        objective,
        (ToySuite.tasks["left"],),
        policy,
        Strategies(),
        workers,
        optimizer,
        ("train", 0, 0),
        seed,
        1,
        0,
        lambda steps, success: None,
        done.append,
    )
    return done, policy


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_raises_success(toy_checkpoint, seed):
    objective = GRPO(iterations=20, groups=8, group_size=8, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=4))
    done, _ = train(toy_checkpoint, objective, seed)
    assert done[0].success < 0.4
    assert np.mean([iteration.success for iteration in done[-3:]]) > 0.8


GOLDEN = (  # loss, kl, grad_norm, clip_fraction, kept
    (-0.008313691, 0.0034082315, 0.16969251, 0.018581081, 0.48387097),
    (-0.011319113, 0.0036707757, 0.22041488, 0.020742358, 0.74358974),
    (-0.0084916787, 0.0043515964, 0.20196244, 0.032608696, 0.61038961),
)


def test_the_first_three_iterations_are_what_they_were(toy_checkpoint):
    objective = GRPO(iterations=3, groups=8, group_size=4, optimizer=AdamWConfig(learning_rate=3e-3, warmup_steps=4))
    done, _ = train(toy_checkpoint, objective)
    seen = [[d.metrics[name] for name in ("loss", "kl", "grad_norm", "clip_fraction", "kept")] for d in done]
    np.testing.assert_allclose(seen, GOLDEN, rtol=1e-4)
