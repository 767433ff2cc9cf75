"""Flow-SDE on a flow that is known in closed form: from N(0, 1) to N(MEAN, DEVIATION^2)."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from perennial.policies._flow.sde import log_density, times, transition

MEAN, DEVIATION = 0.7, 0.4


def velocity(x, t):
    """E[noise - action | x] where x = t noise + (1 - t) action and both are normal."""
    variance = t**2 + (1 - t) ** 2 * DEVIATION**2
    centred = (x - (1 - t) * MEAN) / variance
    return t * centred - (MEAN + (1 - t) * DEVIATION**2 * centred)


def marginal(t):
    return (1 - t) * MEAN, t**2 + (1 - t) ** 2 * DEVIATION**2


def step(x, index, steps, level):
    """One transition of plain numbers [M]."""
    x = torch.as_tensor(x, dtype=torch.float64)[:, None, None]
    index = torch.full((len(x),), index)
    mean, std = transition(x, velocity(x, 1 - index[0].item() / steps), index, steps, torch.tensor(float(level)))
    return mean.flatten().numpy(), std.flatten().numpy()


def pushed(mean, variance, index, steps, level):
    """Mean and variance after a transition of a normal state: the transition is affine, so two points tell it."""
    (low, high), std = step([0.0, 1.0], index, steps, level)
    return low + (high - low) * mean, (high - low) ** 2 * variance + std[0] ** 2


def error_of_one_step(steps, level):
    t = 0.5
    after = pushed(*marginal(t), int(steps * (1 - t)), steps, level)
    return np.abs(np.subtract(after, marginal(t - 1 / steps))).max()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.5])
def test_a_step_keeps_the_marginals_up_to_second_order(level):
    coarse, fine = error_of_one_step(200, level), error_of_one_step(400, level)
    assert 3.5 < coarse / fine < 4.5


def test_noise_does_not_change_what_the_flow_ends_in():
    ends = {}
    for level in (0.0, 0.3):
        mean, variance = 0.0, 1.0
        for index in range(1000):
            mean, variance = pushed(mean, variance, index, 1000, level)
        ends[level] = (mean, variance)
    np.testing.assert_allclose(ends[0.0], (MEAN, DEVIATION**2), rtol=0.01)
    np.testing.assert_allclose(ends[0.3], (MEAN, DEVIATION**2), rtol=0.01)


def test_sampled_end_points_have_the_mean_and_variance_of_the_ode():
    rng = np.random.default_rng(0)
    x = {level: rng.standard_normal(20_000) for level in (0.0, 0.5)}
    for index in range(200):
        for level in x:
            mean, std = step(x[level], index, 200, level)
            x[level] = mean + std * rng.standard_normal(len(mean))
    for values in x.values():
        assert values.mean() == pytest.approx(MEAN, abs=0.02)
        assert values.std() == pytest.approx(DEVIATION, rel=0.03)


def test_without_noise_the_step_is_eulers():
    mean, std = step([0.3, -2.0], 3, 10, 0.0)
    np.testing.assert_allclose(mean, [x - 0.1 * velocity(x, 0.7) for x in (0.3, -2.0)], rtol=1e-12)
    assert not std.any()


@pytest.mark.parametrize("index", range(10))
def test_the_transition_is_that_of_the_published_code(index):
    """Written as in RLinf: a mix of the predicted action and the predicted noise."""
    x, steps, level = 0.4, 10, 0.5
    t, delta = 1 - index / steps, 1 / steps
    sigma = level * np.sqrt(t / (1 - (t if t < 1 else 1 - delta)))
    action, noise = x - velocity(x, t) * t, x + velocity(x, t) * (1 - t)
    expected = action * (1 - (t - delta)) + noise * (t - delta - sigma**2 * delta / (2 * t))
    mean, std = step([x], index, steps, level)
    np.testing.assert_allclose(mean, expected, rtol=1e-10)
    np.testing.assert_allclose(std, np.sqrt(delta) * sigma, rtol=1e-10)


def test_density_and_times():
    x, mean, std = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0]), torch.tensor([0.5, 1.5])
    expected = norm.logpdf(x.numpy(), mean.numpy(), std.numpy())
    np.testing.assert_allclose(log_density(x, mean, std).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(times(torch.tensor([0, 1, 3]), 4).numpy(), [1, 0.75, 0.25])
