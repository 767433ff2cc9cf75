"""Flow-Noise: densities against NumPy and against sampling, what its network starts from, and checkpoints."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from tiny_pi0 import STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.policies import _anatomy
from perennial.policies.base import Batch
from perennial.policies.pi0 import PI0, Exploration, PI0Config
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation

LOW, HIGH = 0.2, 0.8
NOISE = Exploration("all", method="noise", lowest=LOW, highest=HIGH)
OBSERVATION = example_observation(image_size=16, state_dim=STATE_DIM)
ROWS = len(OBSERVATION)


def noisy_policy(seed=None, **changes):
    """With the noise network as it starts, or with random weights named by `seed`."""
    policy = tiny_policy(**({"exploration": NOISE} | changes))
    if seed is not None:
        with torch.no_grad():
            for name, parameter in policy.model.noise_network.named_parameters():
                parameter.add_(torch.from_numpy(stream(seed, name).standard_normal(parameter.shape) * 0.5))
    return policy


def acted(policy, temperature=1.0, observation=OBSERVATION, purpose="act"):
    chunk = policy.act(observation, temperature, [stream(0, purpose, row) for row in range(len(observation))])
    return Batch(observation, chunk.sample, np.ones(chunk.log_prob.shape, bool), temperature, chunk.log_prob)


def deviations(hidden, weights):
    """The noise network in NumPy."""
    x = hidden
    for layer in ("fc1", "fc2", "fc3"):
        x = np.tanh(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return np.exp(math.log(LOW) + (math.log(HIGH) - math.log(LOW)) * (1 + x) / 2)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_the_log_probability_is_that_of_the_whole_chain(temperature):
    policy = noisy_policy(seed=1)
    network = policy.model
    weights = {name: p.detach().double().numpy() for name, p in network.noise_network.named_parameters()}
    batch = acted(policy, temperature)
    values = policy.log_prob(batch).detach().numpy()
    spread = []
    with torch.no_grad():
        for row in range(ROWS):
            one = batch.take(np.array([row]))
            states = one.sample[0, 1:].reshape(-1, 4, 4).astype(np.float64)
            expected = np.zeros((3, 3))
            for number, (before, after) in enumerate(itertools.pairwise(states)):
                prefix, state = policy._prefix(one.observation), policy._state(one.observation)
                x = torch.tensor(before[None], dtype=torch.float32)
                hidden = network.hidden(prefix, state, x, torch.tensor([1 - number / 4]))
                velocity = network.pi0.action_out_proj(hidden)[0].double().numpy()
                deviation = temperature * deviations(hidden[0].double().numpy(), weights)
                spread.append(deviation.std())
                expected += norm.logpdf(after, before - 0.25 * velocity, deviation)[:3, :3]
            np.testing.assert_allclose(values[row], [*expected.sum(-1), 0], rtol=1e-4, atol=1e-4)
    assert min(spread) > 0.01  # the deviations differ


def test_densities_agree_with_sampling():
    """Chains of one policy, weighted by the ratio of densities, stand for those of another (Monte Carlo).

    The weights' mean is 1 and the weighted mean and square of the actions are those of the other policy's own samples.
    """
    count = 3000
    narrow = replace(NOISE, lowest=0.4, highest=0.55)  # else the ratio's variance has no bound
    sizes = {"denoising_steps": 2, "horizon": 1, "executed": 1, "exploration": narrow}
    one, other = noisy_policy(**sizes), noisy_policy(seed=2, **sizes)
    many = OBSERVATION.take(np.zeros(count, int))
    batch, own = acted(one, observation=many), acted(other, observation=many, purpose="other")
    with torch.no_grad():
        ratio = (other.log_prob(batch) - one.log_prob(batch)).double().exp().numpy()[:, 0]
    assert np.abs(np.log(ratio)).max() > 0.5  # the policies differ
    assert ratio.mean() == pytest.approx(1, abs=4 * ratio.std() / math.sqrt(count))
    ends, theirs = one.decode(batch.sample)[:, 0], other.decode(own.sample)[:, 0]
    for power in (1, 2):
        weighted, direct = ratio[:, None] * ends**power, theirs**power
        error = np.sqrt((weighted.var(0) + direct.var(0)) / count)
        assert (np.abs(weighted.mean(0) - direct.mean(0)) < 4 * error).all()


def test_the_density_of_a_number_integrates_to_one():
    policy = noisy_policy(seed=3, denoising_steps=1, horizon=1, executed=1, max_action_dim=3)
    batch = acted(policy, observation=OBSERVATION.take(np.zeros(1, int)))
    grid = np.linspace(-6, 6, 1201)
    samples = np.repeat(batch.sample, len(grid), axis=0)
    samples[:, -3] += grid.astype(np.float32)  # one number of the chain's end
    many = Batch(OBSERVATION.take(np.zeros(len(grid), int)), samples, np.ones((len(grid), 1), bool))
    density = np.exp(policy.log_prob(many).detach().double().numpy()[:, 0])
    rest = np.trapezoid(density, grid)  # of the two other numbers, at their place
    first = policy._prefix(batch.observation), policy._state(batch.observation)
    start, end = (torch.from_numpy(batch.sample[:, 1 + 3 * n : 4 + 3 * n])[:, None] for n in (0, 1))
    with torch.no_grad():
        mean, std = policy._transition(*first, start, torch.tensor([0]), policy._level(1.0))
    expected = norm.pdf(end.numpy(), mean.numpy(), std.numpy())[0, 0, 1:].prod()
    assert rest == pytest.approx(expected, rel=1e-3)


def test_noise_starts_at_the_middle_of_its_bounds_and_stays_between_them():
    policy = noisy_policy()
    hidden = torch.from_numpy(stream(0, "hidden").standard_normal((2, 4, 20)).astype(np.float32))
    torch.testing.assert_close(policy.model.noise_network(hidden), torch.full((2, 4, 4), math.sqrt(LOW * HIGH)))
    wild = noisy_policy(seed=4).model.noise_network(100 * hidden)
    assert LOW - 1e-6 <= wild.min() < 0.3
    assert 0.6 < wild.max() <= HIGH + 1e-6


def test_greedy_decoding_does_not_use_it():
    plain, noisy = tiny_policy(), noisy_policy(seed=5)
    streams = [None] * ROWS
    np.testing.assert_array_equal(
        noisy.act(OBSERVATION, 0.0, streams).actions, plain.act(OBSERVATION, 0.0, streams).actions
    )


def test_the_noise_is_learned_from_rewards():
    """The gradient of the log-probability of wide steps widens, that of narrow steps narrows."""
    policy = noisy_policy()
    many = OBSERVATION.take(np.zeros(256, int))
    batch = acted(policy, observation=many)
    log_prob = policy.log_prob(batch).sum(1)
    wide = log_prob.detach() < log_prob.detach().median()  # far from the means
    bias = policy.model.noise_network.fc3.bias
    (of_wide,) = torch.autograd.grad(log_prob[wide].sum(), bias, retain_graph=True)
    (of_narrow,) = torch.autograd.grad(log_prob[~wide].sum(), bias)
    assert (of_wide[:3] > 0).all()
    assert (of_narrow[:3] < 0).all()


def test_a_checkpoint_without_the_network_begins_it_anew_and_half_of_one_is_refused(tmp_path):
    policy = noisy_policy(seed=6)
    policy.save(tmp_path)
    loaded = PI0.load(tmp_path)
    learned = policy.model.noise_network.fc2.weight
    assert torch.equal(loaded.model.noise_network.fc2.weight, learned)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "noise_network" not in name}, path)
    anew = PI0.load(tmp_path).model.noise_network
    start = noisy_policy().model.noise_network
    assert all(torch.equal(a, b) for a, b in zip(anew.parameters(), start.parameters(), strict=True))
    save_file({name: t for name, t in tensors.items() if name != "noise_network.fc1.bias"}, path)
    with pytest.raises(PerennialError, match=r"lacks noise_network\.fc1\.bias"):
        PI0.load(tmp_path)


def test_the_plan_counts_the_network(tmp_path):
    policy = noisy_policy()
    policy.save(tmp_path)
    counted = _anatomy.parameters(PI0.anatomy(tmp_path, "go left"))
    assert counted == sum(p.numel() for p in policy.model.parameters())


def test_the_config_survives_json_and_refuses_nonsense():
    config = noisy_policy().config
    assert PI0Config.from_json(config.to_json()) == config
    for changes in ({"steps": "one"}, {"lowest": 0.9}, {"lowest": 0.0}, {"method": "other"}):
        with pytest.raises(ValueError, match="exploration"):
            replace(NOISE, **changes)
