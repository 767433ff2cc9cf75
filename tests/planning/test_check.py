"""The refusal of a run that does not fit, and the micro-batch that is chosen so that it does."""

import re
from dataclasses import replace

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
from perennial.policies.lora import LoRA
from perennial.rollout.workers import WorkerConfig
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


def test_a_buffer_larger_than_the_memory_is_refused():
    policy, tasks = ToyPolicy(), [ToySuite.tasks["left"], ToySuite.tasks["up"]]
    needed = 2 * 100 * 3 * 8 * 8  # tasks, decisions, and the numbers of an image
    strategies = (L2(), Replay(capacity=100, episodes=1000))
    check_buffers(strategies, tasks, policy, room=needed)
    with pytest.raises(PerennialError, match=r"'replay' may keep 200 decisions of 2 tasks.* let it keep fewer"):
        check_buffers(strategies, tasks, policy, room=needed - 1)
    decisions = -(-tasks[0].horizon // policy.chunk_steps)
    assert Replay(capacity=10**12, episodes=3).kept(tasks[0], policy) == 3 * decisions
    assert Replay(capacity=10**12, demonstrations="somewhere").kept(tasks[0], policy) == 10**12
