from functools import partial

import pytest
import tiny_openvla_oft
import tiny_pi0

from perennial.policies.openvla import OpenVLA
from perennial.policies.pi0 import Exploration
from perennial.testing import value_conformance
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import CHECKS, Subject, example_observation
from perennial.testing.toy import ToyPolicy

OPENVLA_OBSERVATION = example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM)
PI0_OBSERVATION = example_observation(image_size=16, state_dim=tiny_pi0.STATE_DIM)
FLOW_NOISE = Exploration("all", method="noise", lowest=0.2, highest=0.6)
SUBJECTS = {
    "openvla_oft": Subject(tiny_openvla_oft.tiny_policy, OPENVLA_OBSERVATION),
    "openvla": Subject(partial(tiny_openvla_oft.tiny_policy, kind=OpenVLA), OPENVLA_OBSERVATION),
    "pi0": Subject(tiny_pi0.tiny_policy, PI0_OBSERVATION),
    "pi0, all steps": Subject(lambda: tiny_pi0.tiny_policy(exploration=Exploration("all")), PI0_OBSERVATION),
    "pi0, flow noise": Subject(lambda: tiny_pi0.tiny_policy(exploration=FLOW_NOISE), PI0_OBSERVATION),
    "toy": Subject(ToyPolicy, example_observation(image_size=8, state_dim=2)),
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, name):
    check(SUBJECTS[name])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_openvla_checkpoint(tmp_path_factory.mktemp("hub") / "openvla", settings={"chunk": 2, "hold": 3})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance_of_a_published_checkpoint(check, published):
    check(Subject(partial(OpenVLA.load, published), OPENVLA_OBSERVATION))


@pytest.mark.parametrize("name", ["openvla_oft", "openvla", "toy"])
@pytest.mark.parametrize("check", value_conformance.CHECKS, ids=lambda check: check.__name__)
def test_value_conformance(check, name):
    check(SUBJECTS[name])
