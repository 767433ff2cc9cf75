"""Small policies of other widths."""

import numpy as np
import pytest

from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.policies.openvla_oft_l1 import OpenVLAOFTL1
from perennial.policies.pi0 import PI0
from perennial.policies.smolvla import SmolVLA
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation
from perennial.testing.toy import ToyPolicy

SEEN = example_observation(image_size=64, state_dim=4)


def fresh(policy, **sizes):
    numbers = stream(0, "numbers").normal(size=(8, 4)).astype(np.float32)
    return policy.fresh(list(SEEN.instructions), numbers, numbers, seed=0, **sizes)


@pytest.mark.parametrize("policy", [OpenVLAOFT, OpenVLA, OpenVLAOFTL1, PI0, SmolVLA])
def test_width_scales_every_matrix_between_layers(policy, tmp_path):
    default, narrow, wide = (fresh(policy, width=width) for width in (1.0, 0.5, 2.0))
    weights = {name: weight.shape for name, weight in default.acting_weights().items()}
    for other, factor in ((narrow, 1 / 2), (wide, 2)):
        found = {name: weight.shape for name, weight in other.acting_weights().items()}
        assert found.keys() == weights.keys()
        squares = 0
        for name, shape in weights.items():
            scaled = [b / a for a, b in zip(shape, found[name], strict=True)]
            assert set(scaled) <= {1, factor}, f"{name} went from {shape} to {found[name]}"
            squares += scaled == [factor, factor]
        assert squares > 30
        other.save(tmp_path / str(factor))
        loaded = policy.load(tmp_path / str(factor))
        rngs = [stream(0, "act", row) for row in range(len(SEEN))]
        again = [stream(0, "act", row) for row in range(len(SEEN))]
        np.testing.assert_array_equal(loaded.act(SEEN, 1.0, rngs).sample, other.act(SEEN, 1.0, again).sample)


def test_a_network_of_width_1_is_the_default():
    one, other = fresh(OpenVLAOFT).acting_weights(), fresh(OpenVLAOFT, width=1.0).acting_weights()
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_the_toy_has_a_width_too():
    assert fresh(ToyPolicy, width=0.5).acting_weights()["trunk.weight"].shape == (16, 16)
