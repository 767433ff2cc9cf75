"""Numbers that public reference code gave, and its conventions in our own words; docs/models.md has the table.

Golden numbers were made by running the named code on the weights and inputs that the test makes too.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny_openvla_oft
import torch
from scipy.stats import norm
from tiny_pi0 import ACTION, STATE, STATE_DIM, tiny_policy

from perennial.policies._flow import sde
from perennial.policies._openvla.config import Language
from perennial.policies._openvla.regression import RegressionHead
from perennial.policies._pi0.config import Transformer
from perennial.policies.openvla_oft import NormStats, Quantiles
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation

OBSERVATION = example_observation(image_size=16, state_dim=STATE_DIM)
ROWS = len(OBSERVATION)

LEROBOT_ACTIONS = [
    [-1.354254, -0.024909, 0.96262, -1.195432, -0.216624, 0.290803, -0.917623, -0.263377, -0.067461],
    [0.686749, 1.172431, -0.391117, 0.625013, 1.084487, -0.515659, 0.311305, 0.968729, -0.799466],
    [-1.067425, -0.481632, 0.916107, -0.635443, -0.63838, 0.237693, -0.298349, -0.550101, -0.272231],
    [-0.879472, -0.278741, 1.076777, -0.389887, -0.184927, 0.61524, -0.200952, -0.216854, 0.432461],
    [-1.498005, -0.370034, 1.065899, -0.983341, -0.352906, 0.801109, -0.559437, -0.408044, 0.616178],
    [-0.427494, -0.14986, 1.005403, -0.321713, -0.311749, 0.692173, -0.597648, -0.337433, 0.504827],
]
"""`PI0Pytorch.sample_actions` of LeRobot (7427f318, src/lerobot/policies/pi0/modeling_pi0.py) from noise of zeros."""

LEROBOT_LOSSES = [2.253464, 2.141047, 1.142284, 1.568872, 3.208793, 1.370077]
"""The mean over all numbers of what its `forward` gives for actions of zeros, noise and times as below."""


def set_weights(module, deviation=0.2):
    """Weights named by a stream, which are the same on every machine."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = stream(0, "parity", name).normal(0, deviation, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))


def flow_losses(policy):
    """The flow-matching loss of each row, the mean over all its numbers, for actions of zeros."""
    rng = stream(0, "parity")
    noise = rng.standard_normal((ROWS, 4, 4), dtype=np.float32)
    time = rng.random(ROWS, dtype=np.float32)
    with torch.no_grad():
        noisy = torch.from_numpy(time[:, None, None] * noise)
        prefix, state = policy._prefix(OBSERVATION), policy._state(OBSERVATION)
        velocity = policy.model.velocity(prefix, state, noisy, torch.from_numpy(time)).numpy()
    return ((noise - velocity) ** 2).mean((1, 2))


@pytest.fixture(scope="module")
def pi0():
    """With the eight heads that LeRobot's code takes for granted."""
    heads = {"layers": 2, "heads": 8, "key_value_heads": 1, "head_dim": 8}
    sizes = {"language": Transformer(width=24, mlp_width=32, **heads), "expert": Transformer(20, mlp_width=32, **heads)}
    policy = tiny_policy(**sizes)
    set_weights(policy.model)
    return policy


def test_pi0_decides_as_lerobots(pi0):
    said = pi0.act(OBSERVATION, 0.0, [None] * ROWS).actions
    unit = (said - ACTION.mean) / ACTION.std
    np.testing.assert_allclose(unit.reshape(ROWS, -1), LEROBOT_ACTIONS, atol=5e-5)


def test_the_flow_of_pi0_is_lerobots(pi0):
    np.testing.assert_allclose(flow_losses(pi0), LEROBOT_LOSSES, rtol=1e-4)


def test_pi0_normalises_as_openpi_but_for_its_small_number(pi0):
    """openpi adds 1e-6 to the deviation, LeRobot 1e-8; here nothing is added."""
    states = pi0._state(OBSERVATION).numpy()[:, :STATE_DIM]
    for added, tolerance in ((1e-6, 1e-5), (1e-8, 5e-7)):
        expected = (OBSERVATION.states - np.array(STATE.mean)) / (np.array(STATE.std) + added)
        np.testing.assert_allclose(states, expected, atol=tolerance)
    actions = stream(0, "parity", "actions").normal(size=(ROWS, 3, 3))
    back = pi0.decode(pi0.encode(actions))
    np.testing.assert_allclose(back, actions, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 10])
def test_a_stochastic_step_is_rlinfs(steps):
    """Its form: expected action and expected noise, weighed by what is left of both after the step (a3816b59)."""
    rng = stream(0, "parity", "steps", steps)
    x, velocity = rng.normal(size=(2, 8, 5, 3))
    times = np.append(np.linspace(1, 1 / steps, steps), 0.0)
    for index, (now, then) in enumerate(itertools.pairwise(times)):
        sigma = 0.5 * np.sqrt(now / (1 - (times[1] if now == 1 else now)))
        action, noise = x - velocity * now, x + velocity * (1 - now)
        expected = action * (1 - then) + noise * (then - sigma**2 * (now - then) / (2 * now))
        given = torch.from_numpy(x).float(), torch.from_numpy(velocity).float(), torch.full((8,), index), steps
        mean, std = sde.transition(*given, torch.tensor(0.5))
        np.testing.assert_allclose(mean.numpy(), expected, atol=2e-6)
        np.testing.assert_allclose(std.numpy(), sigma * np.sqrt(now - then), rtol=1e-5)
        density = sde.log_density(torch.from_numpy(x).float(), mean, std).numpy()
        np.testing.assert_allclose(density, norm.logpdf(x, mean, std), atol=1e-4)


def openvla(q01, q99, mask=(), **changes):
    stats = NormStats(Quantiles(q01, q99, mask), tiny_openvla_oft.PROPRIO)
    sizes = {"action_bins": 256, "chunk": 1, "hold": 1, "norm_stats": stats}
    return tiny_openvla_oft.tiny_policy(**(sizes | changes))


def test_action_tokens_are_those_of_prismatic():
    """The last 256 of 32000 ids, the last of them for -1: id 32000 - bin, bins counted from 1."""
    policy = openvla((-1.0,) * 7, (1.0,) * 7)
    edges = np.linspace(-1, 1, 256)
    actions = stream(0, "parity", "tokens").uniform(-1.2, 1.2, (500, 1, 7))
    actions[:256, 0, 0] = edges
    ids = 32000 - 256 + policy.encode(actions)
    clipped = np.clip(actions[:, 0], -1, 1)
    expected = 32000 - (clipped[..., None] >= edges).sum(-1)
    np.testing.assert_array_equal(ids, expected)
    assert (ids.min(), ids.max()) == (31744, 31999)
    every = np.arange(31744, 32000)
    centres = (edges[:-1] + edges[1:]) / 2
    said = policy.decode(np.tile((every - 31744)[:, None], 7))[:, 0, 0]
    np.testing.assert_allclose(said, centres[np.minimum(31999 - every, 254)], atol=1e-7)


def test_numbers_become_actions_as_in_openvla():
    """From the first to the 99th percentile where the mask says so, else as they are."""
    rng = stream(0, "parity", "statistics")
    q01, q99 = tuple(rng.normal(-1, 0.3, 7)), tuple(rng.normal(1, 0.3, 7))
    policy = openvla(q01, q99, (True,) * 6 + (False,))
    sample = rng.integers(0, 256, (200, 7))
    unit = (np.linspace(-1, 1, 256)[:-1] + 1 / 255)[np.minimum(255 - sample, 254)]
    expected = 0.5 * (unit + 1) * (np.array(q99) - q01) + q01
    expected[:, 6] = unit[:, 6]
    np.testing.assert_allclose(policy.decode(sample)[:, 0], expected, atol=2e-7)


def test_the_gripper_closes_at_1_in_libero():
    """As in both evaluation scripts: [0, 1] becomes its sign about the middle, then that is turned round."""
    policy = openvla((0.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,), gripper="libero")
    sample = np.tile(np.array([[0], [120], [126], [255]]), 7)
    unit = (np.linspace(-1, 1, 256)[:-1] + 1 / 255)[np.minimum(255 - sample[:, 0], 254)]
    expected = np.where(unit > 0.5, -1.0, 1.0)
    np.testing.assert_array_equal(policy.decode(sample)[:, 0, 6], expected)


def test_the_regression_head_is_that_of_openvla_oft():
    """Norm, linear, ReLU, two residual blocks of norm, linear and ReLU, norm, linear; in NumPy."""
    config = replace(openvla((0.0,) * 7, (1.0,) * 7).config, chunk=8, language=Language(32, 2, 4, 2, 48))
    head = RegressionHead(config)
    set_weights(head)
    w = {name: parameter.detach().double().numpy() for name, parameter in head.named_parameters()}
    states = stream(0, "parity", "states").normal(size=(4, 56, 32))

    def normed(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[f"model.{name}.weight"] + w[f"model.{name}.bias"]

    def linear(x, name):
        return x @ w[f"model.{name}.weight"].T + w[f"model.{name}.bias"]

    x = np.maximum(linear(normed(states.reshape(4, 8, 224), "layer_norm1"), "fc1"), 0)
    for block in ("mlp_resnet_blocks.0.ffn", "mlp_resnet_blocks.1.ffn"):
        x = x + np.maximum(linear(normed(x, f"{block}.0"), f"{block}.1"), 0)
    expected = linear(normed(x, "layer_norm2"), "fc2")
    np.testing.assert_allclose(head(torch.from_numpy(states).float()).detach().numpy(), expected, atol=1e-5)


def test_slots_are_read_one_position_early_and_see_everything():
    """The official layout: BOS, patches, state, prompt, a zero for each number of the chunk, and the stop token.

    transformers' Llama, given that sequence and a mask that hides nothing, has the same states from the last position
    of the prompt on.
    """
    policy = openvla((0.0,) * 7, (1.0,) * 7, chunk=8, stop_token_id=2, use_proprio=True)
    observation = example_observation(image_size=32, state_dim=3, rows=1)
    model, given = policy.model, policy._inputs(observation)
    llama = model.language_model.model
    with torch.no_grad():
        patches = model.projector(model.vision_backbone(given[0]))
        state = model.proprio_projector(given[3])[:, None]
        words = llama.embed_tokens(given[1])
        stop = llama.embed_tokens(torch.tensor([[2]]))
        parts = [words[:, :1], patches, state, words[:, 1:], torch.zeros(1, 56, 32), stop]
        sequence = torch.cat(parts, dim=1)
        length = sequence.shape[1]
        mask = torch.zeros(1, 1, length, length)
        whole = llama(inputs_embeds=sequence, attention_mask=mask, position_ids=torch.arange(length)[None])
        first = patches.shape[1] + 1 + given[1].shape[1] - 1
        expected = whole.last_hidden_state[:, first : first + 56]
        torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-5)
