"""What the plan says of an update against the most that torch's allocator held at once while it was made."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from middle_policies import POLICIES, ROWS, anatomy_of, batch_of

from perennial.learning.base import gradient_step
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.planning import estimate
from perennial.planning.estimate import Stage, Use
from perennial.policies._placement import recompute_blocks
from perennial.policies.lora import LoRA, add_adapter
from perennial.strategies.composition import Strategies
from perennial.testing.memory import peak_bytes

CASES = [
    ("openvla_oft", 8, torch.float32, False),
    ("openvla_oft", 8, torch.bfloat16, True),
    ("openvla", None, torch.bfloat16, False),
    ("pi0", 8, torch.bfloat16, False),
    ("pi0", 8, torch.float32, True),
    ("smolvla", 8, torch.bfloat16, True),
]
DOCUMENTED = [
    *CASES,
    ("openvla_oft", 8, torch.bfloat16, False),
    ("openvla_oft", None, torch.float32, False),
    ("openvla", 8, torch.float32, True),
    ("pi0", None, torch.float32, False),
    ("pi0, all steps", 8, torch.bfloat16, False),
    ("smolvla", 8, torch.bfloat16, False),
    ("smolvla", None, torch.float32, False),
]
"""The table in docs/models.md; run this file to print it."""


def measured_and_estimated(name, rank, dtype, recompute, tmp_path, repeats=4):
    """Bytes of an update in two micro-batches of `repeats` x ROWS rows, beyond weights and moments."""
    policy = POLICIES[name]()
    anatomy, batch = anatomy_of(policy, tmp_path), batch_of(policy)
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)
    if rank:
        add_adapter(policy, LoRA(rank=rank), 0)
    if recompute:
        recompute_blocks(policy)
    rows = repeats * ROWS
    batch = batch.take(np.arange(2 * rows) % ROWS)
    ones = np.ones(batch.log_prob.shape, np.float32)
    batch = replace(batch, advantage=ones[:, 0], weight=ones)
    config = AdamWConfig(micro_batch=rows)
    optimizer = build_optimizer(policy, Strategies(), config)

    def update():
        gradient_step(policy, batch, GRPO().loss, Strategies(), optimizer, config, np.random.default_rng(0))

    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    use = Use(anatomy, rank, (), str(dtype).removeprefix("torch."), recompute, stages=(Stage(rows),))
    return peak_bytes(update), estimate.memory(use).update


@pytest.mark.parametrize(("name", "rank", "dtype", "recompute"), CASES)
def test_an_update_holds_what_the_plan_says(name, rank, dtype, recompute, tmp_path):
    measured, estimated = measured_and_estimated(name, rank, dtype, recompute, tmp_path)
    assert estimated == pytest.approx(measured, rel=0.15)


if __name__ == "__main__":
    for name, rank, dtype, recompute in DOCUMENTED:
        with tempfile.TemporaryDirectory() as folder:
            measured, estimated = measured_and_estimated(name, rank, dtype, recompute, Path(folder))
        learns, again = f"LoRA {rank}" if rank else "all", "yes" if recompute else "no"
        figures = f"{measured / 1e6:.1f} | {estimated / 1e6:.1f} | {100 * (estimated / measured - 1):+.0f} %"
        print(f"| {name} | {learns} | {str(dtype).removeprefix('torch.')} | {again} | {figures} |", flush=True)
