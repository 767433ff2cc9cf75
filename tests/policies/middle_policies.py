"""Policies large enough that activations outweigh what an estimate of memory leaves out, and still quick."""

from functools import partial

import numpy as np
import tiny_openvla_oft
import tiny_pi0
import tiny_smolvla

from perennial.policies._openvla.config import HALF, IMAGENET_MEAN, IMAGENET_STD, Language, Tower
from perennial.policies._pi0.config import Transformer, Vision
from perennial.policies.base import Batch
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.policies.pi0 import Exploration
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation


def middle_openvla(kind, **changes):
    """Large enough that activations outweigh what the estimate leaves out."""
    sizes = {
        "image_size": 64,
        "dino": Tower(96, 3, 4, 384, IMAGENET_MEAN, IMAGENET_STD, registers=3),
        "siglip": Tower(128, 3, 4, 320, HALF, HALF),
        "projector_width": 256,
        "language": Language(128, 4, 4, 4, 344),
        "chunk": 4,
    }
    return tiny_openvla_oft.tiny_policy(kind=kind, **(sizes | changes))


FLOW = {
    "image_size": 64,
    "vision": Vision(width=128, layers=3, heads=4, mlp_width=320, patch_size=8),
    "horizon": 16,
    "executed": 8,
}


def middle_pi0(**changes):
    heads = {"layers": 3, "heads": 4, "key_value_heads": 1, "head_dim": 32}
    sizes = FLOW | {
        "language": Transformer(width=128, mlp_width=512, **heads),
        "expert": Transformer(width=96, mlp_width=256, **heads),
    }
    return tiny_pi0.tiny_policy(**(sizes | changes))


def middle_smolvla(**changes):
    heads = {"layers": 4, "heads": 4, "key_value_heads": 2, "head_dim": 32}
    sizes = FLOW | {
        "language": Transformer(width=128, mlp_width=344, **heads),
        "expert": Transformer(width=96, mlp_width=256, **heads),
        "shuffle": 2,
    }
    return tiny_smolvla.tiny_policy(**(sizes | changes))


POLICIES = {
    "openvla_oft": partial(middle_openvla, OpenVLAOFT),
    "openvla": partial(middle_openvla, OpenVLA),
    "pi0": middle_pi0,
    "pi0, all steps": partial(middle_pi0, exploration=Exploration("all")),
    "smolvla": middle_smolvla,
    "smolvla, all steps": partial(middle_smolvla, exploration=Exploration("all")),
}
ROWS = 4
SAID = "push the red block to the far corner"


def batch_of(policy):
    observation = example_observation(policy.image_size, 3, rows=ROWS)
    observation = type(observation)(observation.images, (SAID,) * ROWS, observation.states)
    chunk = policy.act(observation, 1.0, [stream(0, "act", row) for row in range(ROWS)])
    return Batch(observation, chunk.sample, np.ones(chunk.log_prob.shape, bool), 1.0, chunk.log_prob)


def anatomy_of(policy, tmp_path):
    policy.save(tmp_path)
    return type(policy).anatomy(tmp_path, SAID)
