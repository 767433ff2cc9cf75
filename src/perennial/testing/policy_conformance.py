"""What every policy must do, as small named checks; authors of policies run them on theirs.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(Subject(make_policy, example_observation(image_size=64, state_dim=4)))

Each check makes its own policies and raises AssertionError where one misbehaves. A policy whose samples are floats, for
example one that integrates a flow, is asked the same, but for what only discrete tokens can promise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from perennial.policies._placement import recompute_blocks
from perennial.policies.base import Batch, Observation, Policy
from perennial.policies.lora import LoRA, add_adapter, base_name, load_adapter, save_adapter, unwrap
from perennial.randomness import stream
from perennial.testing.memory import kept_for_backward

TOLERANCE = 1e-5
"""Of float32."""

INSTRUCTIONS = ("go left", "push the red block to the far corner", "up", "open it", "go right", "reach the goal")


@dataclass(frozen=True)
class Subject:
    """The policy under test.

    Attributes:
        make: builds it with the same weights every time.
        observation: at least four rows whose instructions differ in length.
        tolerance: largest difference of two log-probabilities in nats that rounding may explain.
    """

    make: Callable[[], Policy]
    observation: Observation
    tolerance: float = TOLERANCE


def example_observation(image_size: int, state_dim: int, views: int = 1, rows: int = 6) -> Observation:
    """Noise images and states under instructions of several lengths."""
    rng = stream(0, "conformance")
    images = rng.integers(0, 256, (rows, views, image_size, image_size, 3), dtype=np.uint8)
    instructions = tuple(INSTRUCTIONS[row % len(INSTRUCTIONS)] for row in range(rows))
    return Observation(images, instructions, rng.uniform(-1, 1, (rows, state_dim)).astype(np.float32))


def log_prob_is_that_of_acting(subject: Subject) -> None:
    """The learner sees the log-probability with which the choice was made, at any temperature."""
    policy = subject.make()
    for temperature in (1.0, 1.6):
        batch = _acted(policy, subject.observation, temperature)
        assert batch.log_prob is not None
        np.testing.assert_allclose(_log_prob(policy, batch), batch.log_prob, atol=subject.tolerance)


def logits_give_log_prob_and_imitation_loss(subject: Subject) -> None:
    """Where there are logits, both are those of their softmax, over executed tokens, at its temperature and at 1.

    `outputs` has all three; a classifier gives the same logits from its features.
    """
    policy = subject.make()
    if not policy.can("logits"):
        return
    batch = _acted(policy, subject.observation, 1.6)
    mask = batch.mask & (np.arange(len(policy.token_steps)) <= np.arange(len(batch))[:, None])
    batch = replace(batch, mask=mask)
    with torch.no_grad():
        logits, losses, outputs = policy.logits(batch), policy.imitation_loss(batch), policy.outputs(batch)
        together = outputs.log_prob, outputs.imitation_loss, outputs.logits
        classified = policy.classify(policy.features(batch)) if policy.can("features") else logits
    shape = (len(batch), len(policy.token_steps), policy.bins)
    assert logits.shape == shape, f"logits are {tuple(logits.shape)}, but by `token_steps` and `bins` {shape}"
    chosen, executed = torch.from_numpy(batch.sample)[..., None], torch.from_numpy(mask)
    log_prob = (logits / 1.6).log_softmax(-1).gather(-1, chosen).squeeze(-1)
    np.testing.assert_allclose(_log_prob(policy, batch), log_prob, atol=subject.tolerance)
    surprise = -logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    np.testing.assert_allclose(losses, (surprise * executed).sum(1) / executed.sum(1), atol=subject.tolerance)
    for one, other in zip((*together, classified), (log_prob, losses, logits, logits), strict=True):
        np.testing.assert_allclose(one, other, atol=subject.tolerance)


def batch_neighbours_do_not_matter(subject: Subject) -> None:
    """A row gets the same choice and log-probability alone, among longer prompts and in another order."""
    policy = subject.make()
    batch = _acted(policy, subject.observation, 1.0)
    assert batch.log_prob is not None
    rows = np.arange(len(batch))
    for some in [*rows[:, None], rows[::-1]]:
        chunk = policy.act(batch.observation.take(some), 1.0, [_streams(len(rows))[i] for i in some])
        atol = 0 if _discrete(batch.sample) else subject.tolerance
        np.testing.assert_allclose(chunk.sample, batch.sample[some], rtol=0, atol=atol)
        np.testing.assert_allclose(chunk.log_prob, batch.log_prob[some], atol=subject.tolerance)


def only_the_given_streams_decide(subject: Subject) -> None:
    """Equal streams give equal choices, other streams other ones, and torch's global generator plays no part."""
    policy, rows = subject.make(), len(subject.observation)
    first = policy.act(subject.observation, 1.0, _streams(rows))
    torch.manual_seed(1)
    again = policy.act(subject.observation, 1.0, _streams(rows))
    other = policy.act(subject.observation, 1.0, _streams(rows, "other"))
    np.testing.assert_array_equal(first.sample, again.sample)
    assert (first.sample != other.sample).any(), "another stream gave the same choices"


def greedy_draws_nothing_and_is_the_most_probable(subject: Subject) -> None:
    """Temperature 0 leaves the streams alone, reports log-probability 0, and no other token is more probable.

    Other tokens are tried one at a time, as a token's probability may depend on those before it. A density over paths
    has no most probable action to compare with, so this is asked of discrete tokens only.
    """
    policy, streams = subject.make(), _streams(len(subject.observation))
    greedy = policy.act(subject.observation, 0.0, streams)
    for used, fresh in zip(streams, _streams(len(streams)), strict=True):
        assert used.random() == fresh.random(), "greedy decoding drew a random number"
    np.testing.assert_array_equal(greedy.log_prob, 0)
    again = policy.act(subject.observation, 0.0, streams)
    np.testing.assert_array_equal(again.actions, greedy.actions)
    if not _discrete(greedy.sample):
        return
    sampled = _acted(policy, subject.observation, 1.0)
    best = _log_prob(policy, replace(sampled, sample=greedy.sample))
    for token in range(best.shape[1]):
        tried = greedy.sample.copy()
        tried[:, token] = sampled.sample[:, token]
        other = _log_prob(policy, replace(sampled, sample=tried))
        assert (best[:, token] >= other[:, token] - subject.tolerance).all(), (
            "another token is more probable than the greedy one"
        )


def shapes_are_as_promised(subject: Subject) -> None:
    """Actions are float32 [N, C, D] and finite, log-probabilities float32 [N, K], losses [N]."""
    policy = subject.make()
    rows, tokens = len(subject.observation), len(policy.token_steps)
    chunk = policy.act(subject.observation, 1.0, _streams(rows))
    assert chunk.actions.dtype == np.float32
    assert chunk.actions.shape[:2] == (rows, policy.chunk_steps)
    assert np.isfinite(chunk.actions).all()
    assert chunk.log_prob.dtype == np.float32
    assert chunk.log_prob.shape == (rows, tokens)
    batch = _acted(policy, subject.observation, 1.0)
    assert policy.log_prob(batch).dtype == torch.float32
    assert policy.log_prob(batch).shape == (rows, tokens)
    assert policy.imitation_loss(batch).shape == (rows,)


def encoding_undoes_acting(subject: Subject) -> None:
    """`encode` finds the sampled tokens again, up to neighbours that stand for the same action.

    Continuous actions can be encoded without the path that led to them: what was executed is imitated alike.
    """
    policy = subject.make()
    chunk = policy.act(subject.observation, 1.0, _streams(len(subject.observation)))
    found = policy.encode(chunk.actions)
    assert found.shape == chunk.sample.shape
    assert found.dtype == chunk.sample.dtype
    if not _discrete(found):
        batch = _acted(policy, subject.observation, 1.0)
        again, once = _imitation(policy, replace(batch, sample=found)), _imitation(policy, batch)
        np.testing.assert_allclose(again, once, rtol=1e-4)
        return
    assert np.abs(found - chunk.sample).max() <= 1
    assert (found == chunk.sample).mean() > 0.8


def token_steps_say_when_a_token_starts_to_act(subject: Subject) -> None:
    """Actions from a token's step on do not change the tokens that act before it, nor the loss of imitating them."""
    policy = subject.make()
    steps = policy.token_steps
    assert steps.dtype.kind == "i"
    assert steps.min() == 0
    assert policy.chunk_steps <= policy.imitated_steps
    assert steps.max() < policy.imitated_steps
    ahead, streams = np.arange(policy.imitated_steps) % policy.chunk_steps, _streams(len(subject.observation), "other")
    low = policy.act(subject.observation, 1.0, _streams(len(streams))).actions[:, ahead]
    high = policy.act(subject.observation, 1.0, streams).actions[:, ahead]
    for step in np.unique(steps):
        mixed = policy.encode(np.concatenate([low[:, :step], high[:, step:]], axis=1))
        before = Batch(subject.observation, policy.encode(low), np.tile(steps < step, (len(low), 1)))
        changed = _imitation(policy, replace(before, sample=mixed))
        np.testing.assert_allclose(changed, _imitation(policy, before), rtol=1e-4)
        if _discrete(mixed):
            np.testing.assert_array_equal(mixed, np.where(steps < step, policy.encode(low), policy.encode(high)))


def masked_tokens_do_not_count(subject: Subject) -> None:
    """The imitation loss is the mean of -log-probability over the unmasked tokens, whatever the masked ones are.

    A continuous policy may have another loss; the check of `token_steps` says what masked actions must not change.
    """
    policy = subject.make()
    batch = _acted(policy, subject.observation, 1.0)
    steps = policy.token_steps
    mask = batch.mask & (steps <= np.median(steps[steps < steps.max()]))
    masked = replace(batch, mask=mask)
    if not _discrete(batch.sample):
        return
    expected = -(_log_prob(policy, batch) * mask).sum(1) / mask.sum(1)
    other = replace(masked, sample=np.where(mask, batch.sample, batch.sample[::-1]))
    for case in (masked, other):
        np.testing.assert_allclose(_imitation(policy, case), expected, rtol=1e-4)


def every_parameter_is_in_one_group(subject: Subject) -> None:
    """`groups` partitions the base parameters, before and after an adapter is added."""
    policy = subject.make()
    grouped = sorted(name for names in policy.groups.values() for name in names)
    assert grouped == sorted(name for name, _ in policy.model.named_parameters())
    add_adapter(policy, LoRA(rank=2), 0)
    assert {base_name(name) for name, _ in policy.model.named_parameters()} == set(grouped)


def the_adapter_covers_all_linear_layers(subject: Subject) -> None:
    """Every linear layer has an adapter, and nothing else learns."""
    policy = subject.make()
    linear = {f"{name}.weight" for name, module in policy.model.named_modules() if isinstance(module, nn.Linear)}
    add_adapter(policy, LoRA(rank=2), 0)
    assert {base_name(name) for name in policy.trainable()} == linear
    assert all(".lora_" in name for name in policy.trainable())


def a_new_adapter_changes_nothing(subject: Subject) -> None:
    """Adding an adapter leaves every log-probability as it was."""
    policy = subject.make()
    batch = _acted(policy, subject.observation, 1.0)
    before = _log_prob(policy, batch)
    add_adapter(policy, LoRA(rank=2), 0)
    np.testing.assert_allclose(_log_prob(policy, batch), before, atol=subject.tolerance)


def merged_weights_act_like_the_adapter(subject: Subject) -> None:
    """The acting weights, in a policy without adapter, give the same log-probabilities."""
    policy, plain = subject.make(), subject.make()
    batch = _acted(policy, subject.observation, 1.0)
    before = _log_prob(policy, batch)
    add_adapter(policy, LoRA(rank=2), 0)
    _disturb(policy)
    adapted = _log_prob(policy, batch)
    assert np.abs(adapted - before).max() > 100 * TOLERANCE, "the adapter has no effect"
    plain.model.load_state_dict(policy.acting_weights())
    np.testing.assert_allclose(_log_prob(plain, batch), adapted, rtol=1e-4, atol=10 * subject.tolerance)
    np.testing.assert_array_equal(_log_prob(policy, batch), adapted)


def an_adapter_acts_as_it_learns(subject: Subject) -> None:
    """A policy with an adapter, which it may act with as it is, sees the log-probability of acting again."""
    policy = subject.make()
    add_adapter(policy, LoRA(rank=2), 0)
    _disturb(policy)
    batch = _acted(policy, subject.observation, 1.0)
    assert batch.log_prob is not None
    np.testing.assert_allclose(_log_prob(policy, batch), batch.log_prob, rtol=1e-4, atol=subject.tolerance)


def recomputed_activations_change_nothing(subject: Subject) -> None:
    """A policy that names its blocks has the same log-probability and gradient when they are computed again."""
    policy, twin = subject.make(), subject.make()
    if not policy.can("blocks"):
        return
    batch = _acted(policy, subject.observation, 1.0)
    for one in (policy, twin):
        add_adapter(one, LoRA(rank=2), 0)
        _disturb(one)
    recompute_blocks(twin)
    kept, gradients = [], []
    for one in (policy, twin):
        with kept_for_backward() as sizes:
            loss = one.log_prob(batch).sum()
        kept.append(sum(sizes.values()))
        slopes = torch.autograd.grad(loss, [*one.trainable().values()], allow_unused=True, materialize_grads=True)
        gradients.append([loss.detach(), *slopes])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=subject.tolerance)
    assert kept[1] < kept[0], "nothing is recomputed"


def saved_policies_come_back(subject: Subject) -> None:
    """A base checkpoint and an adapter folder give back the same log-probabilities, bit for bit."""
    policy, twin = subject.make(), subject.make()
    batch = _acted(policy, subject.observation, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder, "base"))
        loaded = type(policy).load(Path(folder, "base"))
        np.testing.assert_array_equal(_log_prob(loaded, batch), _log_prob(policy, batch))
        add_adapter(policy, LoRA(rank=2), 0)
        _disturb(policy)
        save_adapter(policy, Path(folder, "adapter"), base="base")
        load_adapter(twin, Path(folder, "adapter"))
        np.testing.assert_array_equal(_log_prob(twin, batch), _log_prob(policy, batch))


def imitation_learns(subject: Subject) -> None:
    """Twenty steps on one batch lower the imitation loss, with and without an adapter.

    The loss of a continuous policy may draw noise, so the means of the first and last 20 of 60 steps are compared.
    """
    for adapter in (False, True):
        policy = subject.make()
        batch = _acted(policy, subject.observation, 1.0)
        if adapter:
            add_adapter(policy, LoRA(rank=8, alpha=16), 0)
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=5e-3)
        steps, window = (20, 1) if _discrete(batch.sample) else (60, 20)
        losses = [_step(optimizer, policy.imitation_loss(batch).mean()) for _ in range(steps)]
        first, last = np.mean(losses[:window]), np.mean(losses[-window:])
        assert last < 0.9 * first, f"loss went from {first:.3f} to {last:.3f}"


def reinforcement_learns(subject: Subject) -> None:
    """One policy-gradient step makes rewarded choices more probable and punished ones less."""
    policy = subject.make()
    batch = _acted(policy, subject.observation, 1.6)
    before = _log_prob(policy, batch)
    advantage = torch.tensor([1.0, -1.0] * (len(batch) // 2) + [0.0] * (len(batch) % 2))
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=1e-2)
    _step(optimizer, -(policy.log_prob(batch) * advantage[:, None]).mean())
    change = (_log_prob(policy, batch) - before).mean(1)
    assert (change * advantage.numpy()).sum() > 0
    assert change[advantage.numpy() > 0].mean() > change[advantage.numpy() < 0].mean()


CHECKS: tuple[Callable[[Subject], None], ...] = (
    log_prob_is_that_of_acting,
    logits_give_log_prob_and_imitation_loss,
    batch_neighbours_do_not_matter,
    only_the_given_streams_decide,
    greedy_draws_nothing_and_is_the_most_probable,
    shapes_are_as_promised,
    encoding_undoes_acting,
    token_steps_say_when_a_token_starts_to_act,
    masked_tokens_do_not_count,
    every_parameter_is_in_one_group,
    the_adapter_covers_all_linear_layers,
    a_new_adapter_changes_nothing,
    merged_weights_act_like_the_adapter,
    an_adapter_acts_as_it_learns,
    recomputed_activations_change_nothing,
    saved_policies_come_back,
    imitation_learns,
    reinforcement_learns,
)


def _streams(rows: int, purpose: str = "act") -> list[np.random.Generator]:
    return [stream(0, purpose, row) for row in range(rows)]


def _acted(policy: Policy, observation: Observation, temperature: float) -> Batch:
    """What the policy did on `observation`, as a learner gets it."""
    chunk = policy.act(observation, temperature, _streams(len(observation)))
    mask = np.tile(policy.token_steps < policy.chunk_steps, (len(observation), 1))
    return Batch(observation, chunk.sample, mask, temperature, chunk.log_prob)


def _log_prob(policy: Policy, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = policy.log_prob(batch).numpy()
    return values


def _imitation(policy: Policy, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = policy.imitation_loss(batch).numpy()
    return values


def _discrete(sample: np.ndarray) -> bool:
    return sample.dtype.kind == "i"


@torch.no_grad()
def _disturb(policy: Policy) -> None:
    """Give the adapter weights that matter."""
    for name, parameter in unwrap(policy.model).named_parameters():
        if ".lora_" in name:
            noise = stream(0, "disturb", name).normal(0, 0.05, tuple(parameter.shape))
            parameter.add_(torch.from_numpy(noise).to(parameter.dtype))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


__all__: Sequence[str] = ("CHECKS", "Subject", "example_observation")
