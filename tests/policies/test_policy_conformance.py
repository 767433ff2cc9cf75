import pytest
import tiny_openvla_oft
import tiny_pi0

from perennial.policies.pi0 import Exploration
from perennial.testing.policy_conformance import CHECKS, Subject, example_observation
from perennial.testing.toy import ToyPolicy

PI0_OBSERVATION = example_observation(image_size=16, state_dim=tiny_pi0.STATE_DIM)
SUBJECTS = {
    "openvla_oft": Subject(
        tiny_openvla_oft.tiny_policy, example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM)
    ),
    "pi0": Subject(tiny_pi0.tiny_policy, PI0_OBSERVATION),
    "pi0, all steps": Subject(lambda: tiny_pi0.tiny_policy(exploration=Exploration("all")), PI0_OBSERVATION),
    "toy": Subject(ToyPolicy, example_observation(image_size=8, state_dim=2)),
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, name):
    check(SUBJECTS[name])
