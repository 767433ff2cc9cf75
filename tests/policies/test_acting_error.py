"""How far acting is from what the learner sees, with the adapter merged and beside the weights; prints a table."""

from functools import partial

import numpy as np
import pytest
import tiny_openvla_oft
import tiny_pi0
import tiny_smolvla
import torch

from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter
from perennial.policies.openvla import OpenVLA
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation

OPENVLA_OBSERVATION = example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM, rows=16)
FLOW_OBSERVATION = example_observation(image_size=16, state_dim=tiny_pi0.STATE_DIM, rows=16)
POLICIES = {
    "openvla_oft": (tiny_openvla_oft.tiny_policy, OPENVLA_OBSERVATION),
    "openvla": (partial(tiny_openvla_oft.tiny_policy, kind=OpenVLA), OPENVLA_OBSERVATION),
    "pi0": (tiny_pi0.tiny_policy, FLOW_OBSERVATION),
    "smolvla": (tiny_smolvla.tiny_policy, FLOW_OBSERVATION),
}


def taught(make, dtype):
    """A policy with weights of `dtype` whose adapter changes every layer."""
    policy = make()
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)
    add_adapter(policy, LoRA(rank=4), 0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B" in name:
                parameter.add_(torch.from_numpy(stream(0, name).normal(0, 0.02, tuple(parameter.shape))))
    return policy


def errors(name, dtype):
    """Nats between acting and learning, |difference| of every log-probability: beside, merged."""
    make, observation = POLICIES[name]
    learner, merged = taught(make, dtype), make()
    for parameter in merged.model.parameters():
        parameter.data = parameter.data.to(dtype)
    merged.model.load_state_dict(learner.acting_weights())
    found = []
    for actor in (learner, merged):
        chunk = actor.act(observation, 1.0, [stream(0, "act", row) for row in range(len(observation))])
        batch = Batch(observation, chunk.sample, np.ones(chunk.log_prob.shape, bool), 1.0)
        found.append(np.abs(learner.log_prob(batch).detach().numpy() - chunk.log_prob))
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_in_bfloat16_the_learner_acts_closer_to_itself_than_its_merged_copy(name):
    beside, merged = errors(name, torch.bfloat16)
    assert beside.mean() < 0.4 * merged.mean()
    if name != "openvla":  # which acts token by token and learns from all tokens at once
        assert beside.max() < 1e-5


if __name__ == "__main__":
    for name in POLICIES:
        cells = [f"{of.max():.1g}" for dtype in (torch.float32, torch.bfloat16) for of in errors(name, dtype)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
