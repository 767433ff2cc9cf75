"""pi-0 against transformers' own loss and sampler, and Flow-SDE log-probabilities against NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm
from tiny_pi0 import ACTION, STATE, STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.learning.ppo import PPO
from perennial.policies._flow.sde import training_noise
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter
from perennial.policies.pi0 import PI0, Exploration, PI0Config
from perennial.randomness import stream
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies.composition import Strategies
from perennial.testing.policy_conformance import example_observation

OBSERVATION = example_observation(image_size=16, state_dim=STATE_DIM)
ROWS = len(OBSERVATION)
EITHER = pytest.mark.parametrize("steps", ["one", "all"])


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


def streams(rows=ROWS, purpose="act"):
    return [stream(0, purpose, row) for row in range(rows)]


def acted(policy, temperature=1.0, observation=OBSERVATION):
    chunk = policy.act(observation, temperature, streams(len(observation)))
    return Batch(observation, chunk.sample, np.ones(chunk.log_prob.shape, bool), temperature, chunk.log_prob)


def published_inputs(policy, row):
    """What transformers' processor would make of one row, with image tokens in the prompt."""
    config = policy.config
    image = torch.from_numpy(OBSERVATION.images[row]).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    words = policy.tokenizer.encode(OBSERVATION.instructions[row], add_special_tokens=False).ids
    ids = torch.tensor([[config.vocab_size] * 4 + [config.bos_token_id, *words]])
    state = np.zeros(config.max_state_dim)
    state[:STATE_DIM] = (OBSERVATION.states[row] - STATE.mean) / STATE.std
    return {
        "state": torch.tensor(state[None], dtype=torch.float32),
        "input_ids": ids,
        "pixel_values": image[None],
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "attention_mask": torch.ones_like(ids),
    }


def test_greedy_actions_are_those_of_transformers_sampler_started_at_zero(policy):
    greedy = policy.act(OBSERVATION, 0.0, streams()).actions
    for row in range(ROWS):
        start = torch.zeros(1, 4, 4)
        sampled = policy.model.pi0.sample_actions(**published_inputs(policy, row), noise=start, num_steps=4)[0]
        expected = sampled[:3, :3].numpy() * ACTION.std + ACTION.mean
        np.testing.assert_allclose(greedy[row], expected, atol=2e-5)


def test_the_imitation_loss_is_that_of_transformers(policy):
    policy.model.pi0.config.loss_reduction = "none"
    actions = stream(0, "actions").normal(size=(ROWS, 4, 3))
    batch = Batch(OBSERVATION, policy.encode(actions), np.ones((ROWS, 4), bool))
    losses = policy.imitation_loss(batch).detach().numpy()
    for row, key in enumerate(policy._keys(OBSERVATION)):
        time, noise = training_noise(key, 4, 4)
        chunk = np.zeros((1, 4, 4))
        chunk[0, :, :3] = (actions[row] - ACTION.mean) / ACTION.std
        with torch.no_grad():
            loss = policy.model.pi0(
                **published_inputs(policy, row),
                noise=torch.from_numpy(noise)[None],
                timestep=torch.tensor([time], dtype=torch.float32),
                actions=torch.tensor(chunk, dtype=torch.float32),
            ).loss[0]
        assert losses[row] == pytest.approx(loss[:, :3].mean().item(), rel=1e-4)


def test_the_imitation_loss_is_a_mean_over_unmasked_actions(policy):
    actions = stream(0, "actions").normal(size=(ROWS, 4, 3))
    actions[:, 1:] = actions[:, :1]  # so that no mask changes what the expert sees
    batch = Batch(OBSERVATION, policy.encode(actions), np.ones((ROWS, 4), bool))
    masks = [np.tile(np.arange(4) < kept, (ROWS, 1)) for kept in (1, 3, 4)]
    first, three, four = (policy.imitation_loss(replace(batch, mask=mask)).detach().numpy() for mask in masks)
    assert np.abs(first - three).max() > 1e-3
    only_last = replace(batch, mask=np.tile([False, False, False, True], (ROWS, 1)))
    last = policy.imitation_loss(only_last).detach().numpy()
    np.testing.assert_allclose(four, (3 * three + last) / 4, rtol=1e-4)


def test_the_noise_of_imitation_is_new_at_each_step_and_the_same_in_each_order():
    policy = tiny_policy()
    batch = acted(policy)
    keys = policy._keys(OBSERVATION)
    order = np.arange(ROWS)[::-1]
    assert policy._keys(OBSERVATION.take(order)) == keys[::-1]
    before, again = (policy.imitation_loss(b).detach().numpy() for b in (batch, batch.take(order)))
    np.testing.assert_allclose(again[order], before, rtol=1e-4)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    policy.imitation_loss(batch).sum().backward()
    optimizer.step()
    assert not set(policy._keys(OBSERVATION)) & set(keys)


def test_imitation_times_follow_the_published_beta_distribution():
    drawn = np.array([training_noise(str(i), 1, 1)[0] for i in range(4000)])
    edges = np.linspace(0.001, 1, 11)
    expected = np.diff(((edges - 0.001) / 0.999) ** 1.5)  # the distribution function of Beta(1.5, 1)
    assert chisquare(np.histogram(drawn, edges)[0], 4000 * expected).pvalue > 0.01


@EITHER
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_the_log_probability_is_the_normal_density_of_the_stochastic_steps(steps, temperature):
    """Computed from the stored states, one row and one step after another, in float64."""
    policy = tiny_policy(exploration=Exploration(steps, level=0.4))
    batch = acted(policy, temperature)
    values = policy.log_prob(batch).detach().numpy()
    with torch.no_grad():
        for row in range(ROWS):
            one = batch.take(np.array([row]))
            first = int(one.sample[0, 0])
            states = one.sample[0, 1:].reshape(-1, 4, 4).astype(np.float64)
            expected = np.zeros((3, 3))
            for number, before, after in zip(range(first, 4), states[:-1], states[1:], strict=False):
                if steps == "one" and number > first:
                    break
                t = 1 - number / 4
                prefix, state = policy._prefix(one.observation), policy._state(one.observation)
                x = torch.tensor(before[None], dtype=torch.float32)
                v = policy.model.velocity(prefix, state, x, torch.tensor([t]))[0].double().numpy()
                sigma = 0.4 * temperature * np.sqrt(t / (1 - min(t, 0.75)))
                mean = before - 0.25 * (v + sigma**2 / (2 * t) * (before + (1 - t) * v))
                expected += norm.logpdf(after, mean, sigma * 0.5)[:3, :3]
            np.testing.assert_allclose(values[row], [*expected.sum(-1), 0], rtol=1e-4, atol=1e-4)


@EITHER
def test_only_executed_numbers_are_given_noise(steps):
    """Among decisions that start from the same noise, the first step's other numbers do not vary."""
    policy = tiny_policy(exploration=Exploration(steps))
    many = OBSERVATION.take(np.zeros(64, int))

    class Start(np.random.Generator):
        """The same first noise for every row."""

        def standard_normal(self, shape, dtype):
            numbers = super().standard_normal(shape, dtype=dtype)
            numbers[0] = 0.1
            return numbers

    rng = [Start(np.random.Philox(key=row)) for row in range(64)]
    sample = policy.act(many, 1.0, rng).sample
    sample = sample[sample[:, 0] == 0]
    after = sample[:, 1:].reshape(len(sample), -1, 4, 4)[:, 1]
    spread = after.std(0)
    assert (spread[:3, :3] > 0.1).all()
    assert spread[3].max() < 1e-5
    assert spread[:, 3].max() < 1e-5


def test_every_step_is_drawn_and_the_decision_is_the_last_state(policy):
    many = OBSERVATION.take(np.zeros(400, int))
    chunk = policy.act(many, 1.0, streams(400))
    counts = np.bincount(chunk.sample[:, 0].astype(int), minlength=4)
    assert chisquare(counts).pvalue > 0.01
    last = chunk.sample[:, 1:].reshape(400, 3, 4, 4)[:, -1, :3, :3]
    np.testing.assert_allclose(chunk.actions, last * ACTION.std + ACTION.mean, rtol=1e-5, atol=1e-6)


def test_encoded_actions_decode_to_themselves_and_have_no_log_probability(policy):
    actions = stream(0, "actions").normal(size=(ROWS, 3, 3)).astype(np.float32)
    sample = policy.encode(actions)
    np.testing.assert_allclose(policy.decode(sample), actions, atol=1e-6)
    with pytest.raises(PerennialError, match="no log-probability for demonstrations"):
        policy.log_prob(Batch(OBSERVATION, sample, np.ones((ROWS, 4), bool)))


def test_a_number_that_never_moved_encodes_and_acts_as_its_value():
    policy = tiny_policy()
    policy.config = replace(policy.config, action=replace(ACTION, std=(0.5, 0.0, 1.0)))
    assert (policy.encode(np.full((1, 3, 3), 7.0))[0, 1:].reshape(3, 4, 4)[:, :, 1] == 0).all()
    np.testing.assert_allclose(policy.act(OBSERVATION, 1.0, streams()).actions[..., 1], -0.2, rtol=1e-6)


def test_bfloat16_acting_and_learning_agree(tmp_path, policy):
    """Within 0.1 nats of log-probabilities of about 3, in bfloat16 whose numbers have 8 bits."""
    policy.save(tmp_path)
    half = PI0.load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.pi0.model.dit.rotary_emb.inv_freq.dtype == torch.float32
    batch = acted(half)
    np.testing.assert_allclose(half.log_prob(batch).detach().numpy(), batch.log_prob, atol=0.1)


def test_fewer_cameras_are_left_out_and_more_are_refused():
    policy = tiny_policy(views=2)
    one = policy.act(OBSERVATION, 0.0, streams()).actions
    twice = replace(OBSERVATION, images=np.repeat(OBSERVATION.images, 2, axis=1))
    assert np.abs(policy.act(twice, 0.0, streams()).actions - one).max() > 1e-4
    np.testing.assert_allclose(tiny_policy(views=1).act(OBSERVATION, 0.0, streams()).actions, one, atol=1e-6)
    with pytest.raises(PerennialError, match="at most 1 cameras, but the observation has 2"):
        tiny_policy(views=1).act(twice, 0.0, streams())


def test_long_instructions_and_foreign_states_are_refused():
    with pytest.raises(PerennialError, match="takes 9 tokens, but the policy reads 5"):
        tiny_policy(max_prompt_length=5).act(OBSERVATION, 0.0, streams())
    with pytest.raises(PerennialError, match="reads 3 state numbers, but the observation has 2"):
        tiny_policy().act(replace(OBSERVATION, states=OBSERVATION.states[:, :2]), 0.0, streams())


def test_the_config_survives_json_and_refuses_nonsense(policy):
    assert PI0Config.from_json(policy.config.to_json()) == policy.config
    for changes in ({"executed": 5}, {"max_action_dim": 2}):
        with pytest.raises(ValueError, match=r"executed|statistics"):
            replace(policy.config, **changes)
    with pytest.raises(ValueError, match="level"):
        Exploration(level=0.0)


@EITHER
def test_grpo_makes_the_rewarded_action_more_frequent(steps):
    """Episodes of one decision, rewarded where the first action's first number is above its present mean."""
    policy = tiny_policy(exploration=Exploration(steps, level=0.7))
    add_adapter(policy, LoRA(rank=4, alpha=8), seed=0)
    objective = GRPO(epochs=2, minibatches=1, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=0))
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer)
    one = OBSERVATION.take(np.zeros(1, int))

    def actions(purpose, rows=64):
        return policy.act(one.take(np.zeros(rows, int)), 1.0, streams(rows, purpose))

    def rewarded(chunk):
        return chunk.actions[:, 0, 0] > bar

    bar = actions("bar", 256).actions[:, 0, 0].mean()
    before = rewarded(actions("evaluation", 256)).mean()
    for iteration in range(5):
        chunk = actions(f"iteration {iteration}")
        trajectories = [trajectory(one, chunk, row, success) for row, success in enumerate(map(bool, rewarded(chunk)))]
        metrics = objective.update(policy, (), trajectories, Strategies(), optimizer, np.random.default_rng(iteration))
        assert metrics["kept"] > 0
    assert 0.3 < before < 0.7
    assert rewarded(actions("evaluation", 256)).mean() > before + 0.15


def test_a_value_is_read_from_the_first_step_of_the_greedy_decoder(policy, monkeypatch):
    policy.add_value_head(0)
    seen, hidden = [], policy.model.hidden
    monkeypatch.setattr(policy.model, "hidden", lambda *given: seen.append(hidden(*given)) or seen[-1])
    policy.act(OBSERVATION, 0.0, streams())
    expected = policy.value_head(seen[0][:, :3].clone().mean(1))
    batch = Batch(OBSERVATION, policy.encode(np.zeros((ROWS, 3, 3))), np.ones((ROWS, 4), bool))
    torch.testing.assert_close(policy.value(batch), expected, rtol=1e-5, atol=1e-6)


def test_ppo_makes_the_rewarded_action_more_frequent_and_learns_values():
    """Episodes of one decision, rewarded where the first action's first number is above its present mean."""
    policy = tiny_policy(exploration=Exploration("one", level=0.7))
    add_adapter(policy, LoRA(rank=4, alpha=8), seed=0)
    policy.add_value_head(0)
    objective = PPO(epochs=2, minibatches=1, optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=0))
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer)
    one = OBSERVATION.take(np.zeros(1, int))

    def actions(purpose, rows=64):
        return policy.act(one.take(np.zeros(rows, int)), 1.0, streams(rows, purpose))

    bar = actions("bar", 256).actions[:, 0, 0].mean()
    before = (actions("evaluation", 256).actions[:, 0, 0] > bar).mean()
    losses = []
    for iteration in range(5):
        chunk = actions(f"iteration {iteration}")
        rewarded = chunk.actions[:, 0, 0] > bar
        trajectories = [trajectory(one, chunk, row, success) for row, success in enumerate(map(bool, rewarded))]
        metrics = objective.update(policy, (), trajectories, Strategies(), optimizer, np.random.default_rng(iteration))
        losses.append(metrics["value_loss"])
    assert 0.3 < before < 0.7
    assert (actions("evaluation", 256).actions[:, 0, 0] > bar).mean() > before + 0.15
    assert losses[-1] < losses[0]


def trajectory(observation, chunk, row, success):
    """An episode of one decision, in a group of eight."""
    episode = Episode("task", "id", "training", 0, observation.instructions[0], 1.0, ("episode",), group=row // 8)
    sample, log_prob, steps = chunk.sample[[row]], chunk.log_prob[[row]], np.array([3])
    return Trajectory(episode, observation.images, observation.states, sample, log_prob, steps, success)
