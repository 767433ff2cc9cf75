"""Supervised learning on recorded demonstrations, and the mix with pretraining data."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from perennial.demonstrations.dataset import load, to_batch
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.learning.sft import SFT
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.strategies.composition import Strategies
from perennial.testing.toy import ToyPolicy, ToySuite

TOY = "perennial.testing.toy"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations") / "toy"
    record_all(TOY, ("left", "right", "up"), 6, folder, 1, lambda path: None, Settings(image_size=8, image_every=2))
    return folder


def learn(objective, policy, task="left", rng=0):
    optimizer = build_optimizer(policy, Strategies(), objective.optimizer)
    tasks = (ToySuite.tasks[task],)
    return objective.update(policy, tasks, [], Strategies(), optimizer, np.random.default_rng(rng))


def loss_on(policy, folder, task):
    with torch.no_grad():
        return float(policy.imitation_loss(to_batch(load(folder, (task,)), policy)).mean())


def test_it_learns_the_task_at_hand(recorded):
    fast = AdamWConfig(learning_rate=1e-2, warmup_steps=1)
    policy, objective = ToyPolicy(), SFT(demonstrations=str(recorded), steps=40, batch_size=32, optimizer=fast)
    before = loss_on(policy, recorded, "left")
    metrics = learn(objective, policy)
    assert loss_on(policy, recorded, "left") < before - 0.5
    assert metrics["kept"] == 1.0


def test_the_loss_is_the_mean_imitation_loss_of_the_rows_drawn(recorded):
    policy = ToyPolicy()
    still = AdamWConfig(learning_rate=1e-9, warmup_steps=0, micro_batch=5)
    objective = SFT(demonstrations=str(recorded), steps=1, batch_size=12, optimizer=still)
    batch = to_batch(load(recorded, ("left",)), policy)
    rows = np.random.default_rng(7).integers(len(batch), size=12)
    with torch.no_grad():
        expected = float(policy.imitation_loss(batch.take(rows)).mean())
    assert learn(objective, policy, rng=7)["loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_of_the_mix_come_from_both_in_the_expected_share(recorded):
    policy = ToyPolicy()
    target, other = (to_batch(load(recorded, tasks), policy) for tasks in (("left",), None))
    only = to_batch(load(recorded, ("right", "up")), policy)
    objective = SFT(batch_size=4000, target_share=0.2)
    rows = objective.draw(target, only, np.random.default_rng(0))
    share = np.mean(["left" in sentence for sentence in rows.observation.instructions])
    assert len(rows) == 4000
    assert share == pytest.approx(0.2, abs=0.025)
    right = np.mean(["right" in s for s in rows.observation.instructions])
    lengths = [np.mean(["right" in s for s in only.observation.instructions])]
    assert right == pytest.approx(0.8 * lengths[0], abs=0.025)  # in proportion to decisions
    assert set(objective.draw(target, None, np.random.default_rng(0)).observation.instructions) <= set(
        target.observation.instructions
    )
    assert len(other) == len(target) + len(only)


def test_pretraining_data_keeps_what_it_shows(recorded):
    fast = AdamWConfig(learning_rate=1e-2, warmup_steps=1)
    alone, mixed = ToyPolicy(), ToyPolicy()
    objective = SFT(demonstrations=str(recorded), steps=60, batch_size=32, optimizer=fast)
    learn(objective, alone)
    learn(replace(objective, pretraining=str(recorded)), mixed)
    assert loss_on(mixed, recorded, "right") < loss_on(alone, recorded, "right") - 0.5


def test_actions_and_states_are_normalised_as_in_pretraining(tmp_path):
    """The base saw moves three times as wide; fine-tuning on narrow ones must not make them its whole range."""
    recorded = tmp_path / "shown"
    record_all(TOY, ("left",), 6, recorded, 1, lambda path: None, Settings(image_size=64, image_every=2))
    shown = load(recorded, ("left",))
    actions, states = (np.concatenate([getattr(one, name) for one in shown]) for name in ("actions", "states"))
    policy = OpenVLAOFT.fresh([one.instruction for one in shown], 3 * actions, 3 * states, seed=0)
    window = np.resize(actions, (1, policy.chunk_steps, 2))
    before, statistics = policy.encode(window), asdict(policy.config.norm_stats)
    learn(SFT(demonstrations=str(recorded), steps=1, batch_size=4), policy)
    np.testing.assert_array_equal(policy.encode(window), before)
    assert asdict(policy.config.norm_stats) == statistics
    narrow = OpenVLAOFT.fresh([one.instruction for one in shown], actions, states, seed=0)
    middle = policy.config.action_bins / 2
    assert np.abs(before - middle).mean() < 0.5 * np.abs(narrow.encode(window) - middle).mean()


def test_what_is_not_there_is_said_before_the_run(recorded, tmp_path):
    SFT(demonstrations=str(recorded), pretraining=str(recorded)).check(("left",))
    with pytest.raises(PerennialError, match="no demonstration of down in"):
        SFT(demonstrations=str(recorded)).check(("down",))
    with pytest.raises(PerennialError, match=r"no demonstration in .*set --recipe.sft.pretraining"):
        SFT(demonstrations=str(recorded), pretraining=str(tmp_path)).check(("left",))
    with pytest.raises(PerennialError, match=r"target-share is 1\.5"):
        SFT(demonstrations=str(recorded), target_share=1.5).check(("left",))
