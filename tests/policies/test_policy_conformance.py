import pytest
from tiny_openvla_oft import STATE_DIM, tiny_policy

from perennial.testing.policy_conformance import CHECKS, Subject, example_observation
from perennial.testing.toy import ToyPolicy

SUBJECTS = {
    "openvla_oft": Subject(tiny_policy, example_observation(image_size=32, state_dim=STATE_DIM)),
    "toy": Subject(ToyPolicy, example_observation(image_size=8, state_dim=2)),
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, name):
    check(SUBJECTS[name])
