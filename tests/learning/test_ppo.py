"""PPO against a second implementation in NumPy, written from the formulas of arXiv 1707.06347 and 1506.02438."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from perennial.errors import PerennialError
from perennial.learning.optimizer import AdamWConfig, build_optimizer, optimised
from perennial.learning.ppo import PPO
from perennial.learning.stage import learn
from perennial.policies.base import Batch, Outputs
from perennial.policies.lora import LoRA, add_adapter
from perennial.rollout.trajectory import to_batch
from perennial.rollout.workers import Cast, InlineWorkers, WorkerConfig
from perennial.strategies.composition import Strategies
from perennial.strategies.ewc import EWC
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.slca import SLCA
from perennial.testing.policy_conformance import example_observation
from perennial.testing.toy import ToyPolicy, ToySuite

FREE = AdamWConfig(learning_rate=0.0, warmup_steps=0, max_grad_norm=float("inf"))
TOKENS_PER_STEP = 2


@pytest.fixture
def critic(precise):
    """The toy policy with a value head, in float64."""
    precise.add_value_head(0)
    precise.value_head.double()
    return precise


def disturb(policy, size):
    """Move the weights away from those that acted, so that ratios leave 1 and some are clipped."""
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for parameter in optimised(policy).values():
            parameter += size * torch.from_numpy(rng.normal(size=tuple(parameter.shape)))


def update(objective, policy, trajectories):
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer, objective.value_rate)
    return objective.update(policy, (), trajectories, Strategies(), optimizer, np.random.default_rng(0))


def reference(policy, trajectories, objective):
    """Surrogate, squared error, entropy, mean KL estimate, clipped share, explained variance; a token at a time."""
    decisions, values, returns, lambda_returns, advantages = [], [], [], [], []
    for trajectory in trajectories:
        batch = to_batch([trajectory], policy.token_steps)
        with torch.no_grad():
            new = policy.log_prob(batch).numpy()
            value = policy.value(batch).numpy()
            logits = policy.logits(batch).numpy() / trajectory.episode.temperature
        last = len(value) - 1
        for t in range(len(value)):
            outcome = objective.gamma ** (last - t) * float(trajectory.success)
            # Lambda-return: n-step returns, weighted (1 - lambda) lambda^(n - 1), the rest on the whole return.
            lambda_return, left = 0.0, 1.0
            for n in range(1, last - t + 1):
                lambda_return += left * (1 - objective.gae_lambda) * objective.gamma**n * value[t + n]
                left *= objective.gae_lambda
            lambda_return += left * outcome
            values.append(value[t])
            returns.append(outcome)
            lambda_returns.append(lambda_return)
            advantages.append(lambda_return - value[t])
            executed = range(TOKENS_PER_STEP * int(trajectory.steps[t]))
            decisions.append([(new[t, k] - float(trajectory.log_probs[t, k]), logits[t, k]) for k in executed])
    standard = (np.array(advantages) - np.mean(advantages)) / (np.std(advantages) + 1e-6)
    tokens = sum(len(decision) for decision in decisions)
    surrogate = squares = entropy = kl = clipped = 0.0
    for decision, a, v, target in zip(decisions, standard, values, lambda_returns, strict=True):
        squares += len(decision) * (v - target) ** 2
        for log_ratio, scores in decision:
            ratio = np.exp(log_ratio)
            surrogate += min(ratio * a, min(max(ratio, 1 - objective.clip), 1 + objective.clip) * a)
            kl += ratio - 1 - log_ratio
            clipped += (a > 0 and ratio > 1 + objective.clip) or (a < 0 and ratio < 1 - objective.clip)
            chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            entropy -= (chances * np.log(chances)).sum()
    explained = 1 - np.var(np.array(returns) - np.array(values)) / np.var(returns)
    return *(total / tokens for total in (surrogate, squares, entropy, kl, clipped)), explained


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (0.0, {}),
        (0.1, {}),
        (0.1, {"clip": 0.05, "gamma": 0.8, "gae_lambda": 0.5, "value_coefficient": 2.0}),
        (0.2, {"gae_lambda": 0.0, "entropy_coefficient": 0.3}),
    ],
)
def test_loss_and_figures_equal_the_numpy_reference(critic, played, size, settings):
    disturb(critic, size)
    played = [replace(t, episode=replace(t.episode, temperature=1.3)) for t in played]
    objective = PPO(epochs=1, minibatches=1, optimizer=FREE, **settings)
    surrogate, squares, entropy, kl, clipped, explained = reference(critic, played, objective)
    metrics = update(objective, critic, played)
    expected = objective.value_coefficient * squares - surrogate - objective.entropy_coefficient * entropy
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["value_loss"] == pytest.approx(squares, rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(explained, rel=1e-6)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-6, abs=1e-12)
    assert metrics["clip_fraction"] == pytest.approx(clipped, rel=1e-9)
    assert metrics.get("entropy", entropy) == pytest.approx(entropy, rel=1e-6)
    assert ("entropy" in metrics) == (objective.entropy_coefficient > 0)
    assert metrics["kept"] == 1
    if size:
        assert 0.05 < clipped < 0.95


def test_the_loss_of_two_decisions_by_hand():
    class Fixed(ToyPolicy):
        def outputs(self, batch):
            return Outputs(self, batch)

        def log_prob(self, batch):
            return torch.log(torch.tensor([[1.5, 0.5, 9.0, 9.0], [1.1, 0.5, 1.0, 2.0]]))

        def value(self, batch):
            return torch.tensor([0.25, 1.0])

    policy = Fixed()
    mask = np.array([[True, True, False, False], [True] * 4])
    batch = Batch(
        example_observation(image_size=8, state_dim=2, rows=2),
        np.zeros((2, 4), int),
        mask,
        log_prob=np.zeros((2, 4), np.float32),
        advantage=np.array([2.0, -1.0], np.float32),
        target=np.array([1.0, 0.0], np.float32),
        weight=(mask / 6).astype(np.float32),
    )
    loss, figures = PPO(clip=0.2, value_coefficient=0.5).loss(policy.outputs(batch))
    # First decision: 1.2 (clipped) x 2 and 0.5 x 2; second: -1.1, -0.8 (clipped), -1 and -2.
    surrogate = (2.4 + 1.0 - 1.1 - 0.8 - 1.0 - 2.0) / 6
    squares = (2 * 0.75**2 + 4 * 1.0**2) / 6
    assert float(loss) == pytest.approx(-surrogate + 0.5 * squares, rel=1e-6)
    assert figures["value_loss"] == pytest.approx(squares, rel=1e-6)
    assert (figures["tokens"], figures["clip_fraction"]) == (6, 2)


def test_what_happened_after_the_end_of_an_episode_counts_nothing(critic, played):
    disturb(critic, 0.1)
    changed = []
    for trajectory in played:
        unexecuted = critic.token_steps[None] >= trajectory.steps[:, None]
        samples = np.where(unexecuted, 8 - trajectory.samples, trajectory.samples)
        log_probs = np.where(unexecuted, np.float32(-9), trajectory.log_probs)
        changed.append(replace(trajectory, samples=samples, log_probs=log_probs))
    assert any((a.samples != b.samples).any() for a, b in zip(played, changed, strict=True))
    objective = PPO(epochs=1, minibatches=1, optimizer=FREE)
    assert update(objective, critic, changed) == pytest.approx(update(objective, critic, played), rel=1e-12)


def test_minibatches_and_micro_batches_add_up_to_the_whole(critic, played):
    disturb(critic, 0.1)
    whole = update(PPO(epochs=1, minibatches=1, optimizer=FREE), critic, played)
    parts = update(PPO(epochs=2, minibatches=5, optimizer=replace(FREE, micro_batch=7)), critic, played)
    for name in ("loss", "value_loss", "kl", "clip_fraction", "explained_variance"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_an_iteration_without_success_changes_nothing(played):
    policy = ToyPolicy()
    policy.add_value_head(0)
    before = {name: p.detach().clone() for name, p in optimised(policy).items()}
    objective = PPO(optimizer=AdamWConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.1))
    failed = update(objective, policy, [replace(t, success=False) for t in played])
    assert failed["kept"] == failed["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in optimised(policy).items())
    learned = update(objective, policy, [replace(t, success=True) for t in played])
    assert learned.keys() == failed.keys()
    assert learned["kept"] == 1


def test_an_iteration_without_success_is_left_to_strategies_that_want_all(played):
    policy = ToyPolicy()
    policy.add_value_head(0)
    strategies = Strategies((KLAnchor(coefficient=1.0),))
    strategies.before_task(ToySuite.tasks["left"], policy)
    disturb(policy, 0.1)
    failed = [replace(t, success=False) for t in played]
    batch = to_batch(failed, policy.token_steps)

    def divergence():
        return float(strategies.batch_loss(policy.outputs(batch), batch).detach())

    before, head = divergence(), policy.value_head.state_dict()["0.weight"].clone()
    objective = PPO(optimizer=AdamWConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0))
    optimizer = build_optimizer(policy, strategies, objective.optimizer, objective.value_rate)
    metrics = objective.update(policy, (), failed, strategies, optimizer, np.random.default_rng(0))
    assert (metrics["kept"], metrics["loss"], metrics["value_loss"], metrics["explained_variance"]) == (0, 0, 0, 0)
    assert metrics["grad_norm"] > 0
    assert divergence() < 0.9 * before
    assert torch.equal(policy.value_head.state_dict()["0.weight"], head)


def test_where_returns_do_not_vary_nothing_is_explained(played):
    policy = ToyPolicy()
    policy.add_value_head(0)
    _, explained = PPO(gamma=1.0).assess(policy, [replace(t, success=True) for t in played])
    assert explained == 0


def test_the_value_head_has_its_own_learning_rate_and_no_strategy_sees_it(played):
    for strategies in (Strategies(), Strategies((SLCA(), EWC()))):
        policy = ToyPolicy()
        add_adapter(policy, LoRA(2, 2), 0)
        policy.add_value_head(0)
        objective = PPO(epochs=1, minibatches=1, value_rate=5.0, optimizer=AdamWConfig(0.01, eps=1e-30, warmup_steps=0))
        optimizer = build_optimizer(policy, strategies, objective.optimizer, objective.value_rate)
        before = policy.value_head.state_dict()["0.weight"].clone()
        objective.update(policy, (), played, strategies, optimizer, np.random.default_rng(0))
        # The first step of Adam moves every weight by its group's rate.
        moved = (policy.value_head.state_dict()["0.weight"] - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.05))
        assert not any("value_head" in name for name in (*policy.trainable(), *policy.acting_weights()))


def test_an_entropy_bonus_needs_logits():
    assert PPO().requires() == {"log_prob", "value"}
    assert PPO(entropy_coefficient=0.01).requires() == {"log_prob", "value", "logits"}


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_discounts_above_1_are_refused(name):
    PPO(**{name: 1.0}).check(())
    with pytest.raises(PerennialError, match=rf"--recipe\.ppo\.{name} is 1\.5, but it must be at most 1"):
        PPO(**{name: 1.5}).check(())


def test_rollouts_are_dealt_to_tasks_states_and_words_in_turn():
    tasks = (ToySuite.tasks["left"], ToySuite.tasks["up"])
    objective = PPO(rollouts=6, initial_states=4, temperature=1.3)
    rounds = [objective.episodes(tasks, ("train", 0, 0, number)) for number in range(2)]
    assert [e.task for e in rounds[0]] == ["left", "up"] * 3
    assert [[e.initial_state for e in some] for some in rounds] == [[0, 0, 1, 1, 2, 2], [3, 3, 0, 0, 1, 1]]
    everything = [e for some in rounds for e in some]
    assert {(e.split, e.temperature) for e in everything} == {("training", 1.3)}
    assert {e.instruction for e in everything} == {*tasks[0].instructions, *tasks[1].instructions}
    assert len({e.key for e in everything}) == 12


def test_learning_raises_success_and_lowers_the_value_loss(toy_checkpoint):
    objective = PPO(iterations=16, rollouts=48, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=4))
    policy, done = ToyPolicy.load(toy_checkpoint), []
    policy.add_value_head(0)
    toy = "perennial.testing.toy"
    learn(
        objective,
        (ToySuite.tasks["left"],),
        policy,
        Strategies(),
        InlineWorkers(WorkerConfig("inline", slots=48), Cast(toy, toy, toy_checkpoint, 0), policy.acting_weights()),
        build_optimizer(policy, Strategies(), objective.optimizer, objective.value_rate),
        key=("train", 0, 0),
        seed=0,
        threads=1,
        start=0,
        on_episode=lambda steps, success: None,
        on_iteration=done.append,
    )
    assert done[0].success < 0.4
    assert np.mean([iteration.success for iteration in done[-3:]]) > 0.8
    losses = [iteration.metrics["value_loss"] for iteration in done]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_one_update_makes_what_led_to_success_more_probable(played):
    policy = ToyPolicy()
    policy.add_value_head(0)
    won, lost = (to_batch([t for t in played if t.success == fate], policy.token_steps) for fate in (True, False))

    def preference():
        with torch.no_grad():
            return [float((policy.log_prob(b) * torch.from_numpy(b.mask)).sum() / b.mask.sum()) for b in (won, lost)]

    before = preference()
    update(PPO(optimizer=AdamWConfig(learning_rate=3e-3, warmup_steps=0)), policy, played)
    after = preference()
    assert after[0] - before[0] > 0 > after[1] - before[1]
