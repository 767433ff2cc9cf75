import pytest
import torch

from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig, build_optimizer
from perennial.learning.stage import learn
from perennial.rollout.workers import Cast, InlineWorkers, WorkerConfig
from perennial.strategies.composition import Strategies
from perennial.testing.toy import ToyPolicy, ToySuite

TOY = "perennial.testing.toy"
OBJECTIVE = GRPO(iterations=4, groups=4, group_size=4, optimizer=AdamWConfig(learning_rate=1e-2))


class StopError(Exception):
    pass


class Learner:
    def __init__(self, checkpoint):
        self.policy = ToyPolicy.load(checkpoint)
        self.optimizer = build_optimizer(self.policy, Strategies(), OBJECTIVE.optimizer)
        weights = self.policy.acting_weights()
        self.workers = InlineWorkers(WorkerConfig("inline"), Cast(TOY, TOY, checkpoint, 0), weights)
        self.done, self.episodes = [], []

    def run(self, start, stop_after=None):
        def on_iteration(iteration):
            self.done.append(iteration)
            if iteration.number == stop_after:
                raise StopError

        learn(
            OBJECTIVE,
            (ToySuite.tasks["left"],),
            self.policy,
            Strategies(),
            self.workers,
            self.optimizer,
            ("train", 0, 0),
            0,
            1,
            start,
            lambda steps, success: self.episodes.append((steps, success)),
            on_iteration,
        )


def test_a_stage_stopped_in_the_middle_goes_on_with_the_same_numbers(toy_checkpoint):
    whole, broken = Learner(toy_checkpoint), Learner(toy_checkpoint)
    whole.run(0)
    with pytest.raises(StopError):
        broken.run(0, stop_after=1)
    broken.run(2)
    assert [i.number for i in broken.done] == [0, 1, 2, 3]
    assert len({i.metrics["loss"] for i in broken.done}) == 4
    for one, other in zip(broken.done, whole.done, strict=True):
        assert (one.success, one.env_steps, one.metrics) == (other.success, other.env_steps, other.metrics)
    learned = whole.policy.trainable()
    assert all(torch.equal(p, learned[name]) for name, p in broken.policy.trainable().items())


def test_each_iteration_acts_with_the_weights_that_the_last_one_left(toy_checkpoint):
    learner = Learner(toy_checkpoint)
    learner.run(0)
    stale = Learner(toy_checkpoint)
    stale.workers.broadcast = lambda weights: None
    stale.run(0)
    # The KL estimate measures how far the learner is from the weights that acted.
    assert stale.done[-1].metrics["kl"] > 2 * learner.done[-1].metrics["kl"] > 0


def test_an_iteration_counts_what_was_played(toy_checkpoint):
    learner = Learner(toy_checkpoint)
    learner.run(3)
    (iteration,) = learner.done
    assert iteration.number == 3
    assert iteration.episodes == len(learner.episodes) == 16
    assert iteration.env_steps == sum(steps for steps, _ in learner.episodes)
    assert iteration.success == sum(success for _, success in learner.episodes) / 16
