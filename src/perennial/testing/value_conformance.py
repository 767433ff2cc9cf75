"""What every policy with a value head must do beside the checks of `policy_conformance`, as small named checks.

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_values(check):
check(Subject(make_policy, example_observation(image_size=64, state_dim=4)))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from perennial.learning.optimizer import optimised
from perennial.policies._learned import load_learned, save_learned
from perennial.policies.base import Batch, Policy
from perennial.policies.lora import LoRA, add_adapter
from perennial.testing.policy_conformance import TOLERANCE, Subject, _acted, _log_prob, _step


def values_judge_states(subject: Subject) -> None:
    """Values are float32 [N] and finite; they depend neither on what was chosen nor on the other rows."""
    policy = _with_values(subject)
    batch = _acted(policy, subject.observation, 1.6)
    values = policy.value(batch)
    assert values.dtype == torch.float32
    assert values.shape == (len(batch),)
    expected = _value(policy, batch)
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 100 * TOLERANCE, "every state has the same value"
    other = replace(batch, sample=np.roll(batch.sample, 1, axis=0), mask=~batch.mask, temperature=1.0)
    np.testing.assert_array_equal(_value(policy, other), expected)
    rows = np.arange(len(batch))
    for some in [*rows[:, None], rows[::-1]]:
        np.testing.assert_allclose(_value(policy, batch.take(some)), expected[some], atol=TOLERANCE)


def log_probabilities_and_values_come_together(subject: Subject) -> None:
    """`outputs` has both, with the same gradient."""
    policy = _with_values(subject)
    batch = _acted(policy, subject.observation, 1.6)
    outputs = policy.outputs(batch)
    together, apart = (outputs.log_prob, outputs.value), (policy.log_prob(batch), policy.value(batch))
    gradients, learning = [], list(optimised(policy).values())
    for log_prob, value in (together, apart):
        loss = (log_prob.mean(1) * value).sum()
        gradients.append(torch.autograd.grad(loss, learning, allow_unused=True, materialize_grads=True))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=TOLERANCE)


def the_value_head_is_no_part_of_the_policy(subject: Subject) -> None:
    """Adding one changes neither the choices nor what acts, learns or is grouped; its seed alone names its weights."""
    policy, plain = subject.make(), subject.make()
    random = torch.get_rng_state()
    policy.add_value_head(1)
    assert torch.equal(torch.get_rng_state(), random), "adding a value head drew from torch's global generator"
    batch = _acted(plain, subject.observation, 1.0)
    np.testing.assert_array_equal(_log_prob(policy, batch), _log_prob(plain, batch))
    assert policy.acting_weights().keys() == plain.acting_weights().keys()
    assert list(policy.trainable()) == list(plain.trainable())
    assert policy.groups == plain.groups
    first = _value(policy, batch)
    policy.add_value_head(2)
    assert (_value(policy, batch) != first).all(), "another seed gave the same value head"
    policy.add_value_head(1)
    np.testing.assert_array_equal(_value(policy, batch), first)


def values_learn(subject: Subject) -> None:
    """The gradient reaches every parameter of the head, and twenty steps on the head alone bring values nearer."""
    policy = _with_values(subject)
    assert policy.value_head is not None
    batch = _acted(policy, subject.observation, 1.0)
    target = torch.tensor([1.0, 0.0] * len(batch))[: len(batch)]
    optimizer = torch.optim.AdamW(policy.value_head.parameters(), lr=1e-2)
    losses = [_step(optimizer, ((policy.value(batch) - target) ** 2).mean()) for _ in range(20)]
    for name, parameter in policy.value_head.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.abs().max() > 0, f"no gradient reaches {name}"
    assert losses[-1] < 0.9 * losses[0], f"the squared error went from {losses[0]:.3f} to {losses[-1]:.3f}"


def saved_values_come_back(subject: Subject) -> None:
    """What was learned gives back the same values, bit for bit, with and without an adapter."""
    for adapter in (False, True):
        policy, twin = _with_values(subject), _with_values(subject, seed=2)
        for each in (policy, twin) if adapter else ():
            add_adapter(each, LoRA(rank=2), 0)
        batch = _acted(policy, subject.observation, 1.0)
        with torch.no_grad():
            for parameter in optimised(policy).values():
                parameter.add_(0.01)
        with tempfile.TemporaryDirectory() as folder:
            save_learned(policy, Path(folder), base="base")
            load_learned(twin, Path(folder))
        np.testing.assert_array_equal(_value(twin, batch), _value(policy, batch))


CHECKS: tuple[Callable[[Subject], None], ...] = (
    values_judge_states,
    log_probabilities_and_values_come_together,
    the_value_head_is_no_part_of_the_policy,
    values_learn,
    saved_values_come_back,
)


def _with_values(subject: Subject, seed: int = 1) -> Policy:
    policy = subject.make()
    policy.add_value_head(seed)
    return policy


def _value(policy: Policy, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = policy.value(batch).numpy()
    return values
