"""The refusal of a run that does not fit, and the micro-batch that is chosen so that it does."""

import re
from dataclasses import replace

import numpy as np
import pytest

from perennial import overrides
from perennial.config import PolicyChoice, preset
from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.learning.sft import SFT
from perennial.planning import estimate
from perennial.planning.check import check_buffers, check_memory, fit_micro_batches
from perennial.planning.reading import read_anatomy, use_of
from perennial.policies.base import Batch, Observation
from perennial.policies.lora import LoRA, add_adapter
from perennial.rollout.workers import WorkerConfig
from perennial.strategies._memory import row_bytes, to_tensors
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.expansion import Expansion
from perennial.strategies.l2 import L2
from perennial.strategies.replay import Replay
from perennial.testing.toy import ToyPolicy, ToySuite

DEMO = preset("demo")
LARGE = AdamWConfig(micro_batch=256)


def peak(config):
    """Bytes on the CPU."""
    _, anatomy = read_anatomy(config)
    return estimate.memory(use_of(config, anatomy, on_cpu=True)).peak


def micro_batches(config):
    return [stage.optimizer.micro_batch for stage in config.recipe]


def test_what_does_not_fit_is_refused_with_what_would_fit():
    published = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="float32")
    config = replace(DEMO, policy=published, recipe=(GRPO(optimizer=LARGE), SFT(optimizer=LARGE)))
    with pytest.raises(
        PerennialError, match=r"needs .* GB of memory on cpu, but 60 GB are free; it fits with "
    ) as error:
        check_memory(config, room=60e9)
    changes = dict(re.findall(r"--(\S+) (\w+)", str(error.value)))
    assert "recipe.grpo.optimizer.micro_batch" in changes
    assert changes["recipe.grpo.optimizer.micro_batch"] == changes["recipe.sft.optimizer.micro_batch"]
    lighter = overrides.apply(config, changes)
    _, anatomy = read_anatomy(lighter)
    assert estimate.memory(use_of(lighter, anatomy, on_cpu=True)).peak < 60e9
    check_memory(lighter, room=60e9)
    with pytest.raises(PerennialError, match=r"but 10 GB are free, and no switch brings it below 1\d"):
        check_memory(config, room=10e9)


def test_a_run_that_has_begun_is_told_what_it_can_still_do():
    published = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="float32")
    config = replace(DEMO, policy=published, recipe=(GRPO(optimizer=LARGE),))
    with pytest.raises(
        PerennialError, match=r"60 GB are free; free some, or start a new run with --workers\.backend .*, which"
    ):
        check_memory(config, room=60e9, begun=True)


def test_a_run_with_every_switch_turned_is_still_refused_in_a_sentence():
    light = PolicyChoice(checkpoint="nowhere", dtype="bfloat16", checkpointing=True)
    least = (GRPO(optimizer=AdamWConfig(micro_batch=1)),)
    config = replace(DEMO, policy=light, recipe=least, workers=WorkerConfig(backend="inline", slots=1))
    with pytest.raises(PerennialError, match=r"but 1 GB are free, and no switch brings it below"):
        check_memory(config, room=1e9)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=32)])
def test_frozen_groups_need_no_moments_and_no_activations(adapter):
    """A run that only moves the action head fits where one that moves everything does not."""
    policy = PolicyChoice(checkpoint="nowhere", adapter=adapter, dtype="bfloat16")
    config = replace(DEMO, policy=policy, recipe=(SFT(optimizer=LARGE),))
    head = replace(config, recipe=(SFT(optimizer=LARGE, learns=("action",)),))
    check_memory(head, room=45e9)
    with pytest.raises(PerennialError, match="but 45 GB are free"):
        check_memory(config, room=45e9)
    both = replace(config, recipe=(*head.recipe, *config.recipe))
    assert peak(both) == peak(config)


def test_no_micro_batch_is_larger_than_the_batch():
    policy = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="bfloat16")
    small = replace(DEMO, policy=policy, recipe=(SFT(optimizer=LARGE, batch_size=4),))
    same = replace(small, recipe=(SFT(optimizer=AdamWConfig(micro_batch=4), batch_size=4),))
    assert peak(small) == peak(same)
    check_memory(small, room=peak(same))


def test_open_micro_batches_become_the_largest_that_fit():
    policy = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="bfloat16")
    fixed = GRPO(optimizer=AdamWConfig(micro_batch=2))
    config = replace(DEMO, policy=policy, recipe=(SFT(), fixed))
    found = fit_micro_batches(config, room=60e9)
    rows, other = micro_batches(found)
    assert 1 < rows < 256
    assert other == 2
    assert peak(found) <= 60e9
    double = replace(config, recipe=(SFT(optimizer=AdamWConfig(micro_batch=2 * rows)), fixed))
    assert peak(double) > 60e9
    assert fit_micro_batches(found, room=200e9) == found
    assert micro_batches(fit_micro_batches(config, room=1e15)) == [256, 2]


def test_where_nothing_fits_it_is_the_smallest_and_the_other_switches_are_named():
    published = PolicyChoice(checkpoint="nowhere", adapter=LoRA(rank=32), dtype="float32")
    config = replace(DEMO, policy=published, recipe=(GRPO(),))
    found = fit_micro_batches(config, room=60e9)
    assert micro_batches(found) == [1]
    with pytest.raises(PerennialError, match=r"it fits with --workers.backend shared, which"):
        check_memory(found, room=60e9)


def test_a_policy_of_which_nothing_is_known_gets_the_most():
    config = replace(DEMO, policy=PolicyChoice(name="perennial.testing.toy"))
    assert micro_batches(fit_micro_batches(config, room=0)) == [256]


ROW = 3 * 8 * 8 + 4 * 9
"""Bytes of a toy decision: an image, and four tokens of eight bytes with their masks."""
LOGITS = 4 * 9 * 4


def test_buffers_larger_than_the_memory_are_refused():
    policy, tasks = ToyPolicy(), [ToySuite.tasks["left"], ToySuite.tasks["up"]]
    one, other = Replay(capacity=100, episodes=1000), DarkReplay(capacity=50, episodes=1000)
    for strategies, needed in (
        ([L2(), one], 2 * 100 * ROW),
        ([other], 2 * 50 * (ROW + LOGITS)),
        ([one, other], 2 * 100 * ROW + 2 * 50 * (ROW + LOGITS)),
        ([Replay(capacity=10**12, episodes=3)], 2 * 3 * -(-tasks[0].horizon // policy.chunk_steps) * ROW),
        ([Replay(capacity=7000, demonstrations="somewhere")], 2 * 7000 * ROW),
    ):
        check_buffers(strategies, tasks, policy, room=needed)
        with pytest.raises(PerennialError, match=r"Of 2 tasks strategies may keep more .* on cpu: .*keep fewer"):
            check_buffers(strategies, tasks, policy, room=needed - 1)


def test_a_kept_decision_is_counted_as_it_is():
    policy = ToyPolicy()
    logits = np.zeros((5, 4, 9), np.float32)
    images = np.zeros((5, 1, 8, 8, 3), np.uint8)
    observation = Observation(images, ("go",) * 5, np.zeros((5, 0), np.float32))
    batch = Batch(observation, np.zeros((5, 4), np.int64), np.ones((5, 4), bool), logits=logits)
    tensors = {name: tensor for name, tensor in to_tensors(batch).items() if name != "instructions"}
    assert sum(tensor.nbytes for tensor in tensors.values()) == 5 * row_bytes(policy, policy.bins)


def test_an_expansion_keeps_what_learns_once_a_task():
    policy, tasks = ToyPolicy(), [ToySuite.tasks["left"], ToySuite.tasks["up"]]
    whole = 4 * sum(p.numel() for p in policy.model.parameters())
    check_buffers([Expansion()], tasks, policy, room=2 * whole)
    with pytest.raises(PerennialError, match=r"on cpu: 'expansion' .* or learn an adapter, not all weights"):
        check_buffers([Expansion()], tasks, policy, room=2 * whole - 1)
    add_adapter(policy, LoRA(1, 1), seed=0)
    adapter = 4 * sum(p.numel() for p in policy.trainable().values())
    assert adapter < whole
    check_buffers([Expansion()], tasks, policy, room=2 * adapter)
