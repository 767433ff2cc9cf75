"""Every policy against the conformance suites; run this file to write the table of docs/models.md again."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_openvla_oft
import tiny_pi0
import tiny_smolvla
import torch

from perennial.policies.base import Policy
from perennial.policies.openvla import OpenVLA
from perennial.policies.pi0 import Exploration
from perennial.testing import policy_conformance, value_conformance
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
    "smolvla": Subject(tiny_smolvla.tiny_policy, PI0_OBSERVATION),
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


WITH_VALUES = ("openvla_oft", "openvla", "pi0", "pi0, all steps", "pi0, flow noise", "smolvla", "toy")


@pytest.mark.parametrize("name", WITH_VALUES)
@pytest.mark.parametrize("check", value_conformance.CHECKS, ids=lambda check: check.__name__)
def test_value_conformance(check, name):
    check(SUBJECTS[name])


HALF = ("openvla_oft", "openvla", "pi0", "pi0, all steps", "pi0, flow noise", "smolvla")
HALF_TOLERANCE = 0.15
HALF_CHECKS = (
    policy_conformance.log_prob_is_that_of_acting,
    policy_conformance.a_new_adapter_changes_nothing,
    policy_conformance.an_adapter_acts_as_it_learns,
    policy_conformance.recomputed_activations_change_nothing,
)
"""What may depend on rounding, and is asked of bfloat16 too."""


def in_bfloat16(make):
    policy = make()
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return policy


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("check", HALF_CHECKS, ids=lambda check: check.__name__)
def test_conformance_in_bfloat16(check, name):
    subject = SUBJECTS[name]
    check(replace(subject, make=partial(in_bfloat16, subject.make), tolerance=HALF_TOLERANCE))


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(<!-- conformance -->\n).*?(<!-- end -->)", re.DOTALL)


def table():
    """Which property is asked of which policy in which type, as the tests above do."""
    names = [name for name in SUBJECTS if name != "toy"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for check in (*CHECKS, *value_conformance.CHECKS):
        cells = []
        for name in names:
            asked = check in CHECKS or name in WITH_VALUES
            if check is policy_conformance.logits_give_log_prob_and_imitation_loss:
                asked = type(SUBJECTS[name].make()).logits is not Policy.logits
            half = check in HALF_CHECKS and name in HALF
            cells.append("both" if half else "float32" if asked else "-")
        lines.append(f"| {check.__name__.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_documentation_shows_what_is_tested():
    found = TABLE.search(PAGE.read_text())
    assert found is not None
    assert found[0] == f"{found[1]}{table()}{found[2]}"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda found: f"{found[1]}{table()}{found[2]}", PAGE.read_text()))
