from dataclasses import replace

import pytest
import torch

from perennial.strategies.expansion import Expansion
from strategies.worlds import TASKS, no_episodes, policy, shake


def taught(expansion, learner, names):
    """The acting weights with which each task was left."""
    left_with = {}
    for seed, name in enumerate(names):
        expansion.before_task(TASKS[name], learner)
        shake(learner, seed)
        left_with[name] = learner.acting_weights()
        expansion.remember(TASKS[name], learner, no_episodes)
    return left_with


def acting_in(expansion, learner, name):
    return expansion.policy_for(TASKS[name], learner)


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("adapter", [False, True])
def test_every_task_acts_with_exactly_the_weights_it_was_left_with(adapter):
    learner, expansion = policy(adapter), Expansion()
    left_with = taught(expansion, learner, ["left", "up", "right"])
    for name, weights in left_with.items():
        assert_same(acting_in(expansion, learner, name), weights)
    assert not torch.equal(left_with["left"]["head.weight"], left_with["up"]["head.weight"])


@pytest.mark.parametrize("adapter", [False, True])
def test_every_task_starts_from_the_base(adapter):
    learner, expansion = policy(adapter), Expansion()
    base = learner.acting_weights()
    taught(expansion, learner, ["left", "up"])
    expansion.before_task(TASKS["right"], learner)
    assert_same(learner.acting_weights(), base)


def test_tasks_not_taught_are_served_as_chosen():
    for held_out in ("base", "last"):
        learner, expansion = policy(adapter=True), Expansion(held_out=held_out)
        base = learner.acting_weights()
        left_with = taught(expansion, learner, ["up", "left"])
        expected = base if held_out == "base" else left_with["left"]
        assert_same(acting_in(expansion, learner, "down-right"), expected)


def test_before_anything_was_taught_the_base_acts():
    learner = policy(adapter=True)
    for held_out in ("base", "last"):
        expansion = Expansion(held_out=held_out)
        assert_same(acting_in(expansion, learner, "left"), learner.acting_weights())


def test_the_task_being_learned_acts_with_what_is_learned_so_far():
    learner, expansion = policy(adapter=True), Expansion()
    left_with = taught(expansion, learner, ["left"])
    expansion.before_task(TASKS["up"], learner)
    shake(learner, seed=9)
    assert_same(acting_in(expansion, learner, "up"), learner.acting_weights())
    assert_same(acting_in(expansion, learner, "left"), left_with["left"])


def test_looking_up_a_task_leaves_the_learner_alone():
    learner, expansion = policy(adapter=True), Expansion()
    taught(expansion, learner, ["left", "up"])
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    acting_in(expansion, learner, "left")
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


def test_nearest_serves_an_untaught_task_by_the_one_that_sounds_most_alike_also_after_a_restart():
    learner, expansion = policy(adapter=True), Expansion(held_out="nearest")
    base = learner.acting_weights()
    left_with = taught(expansion, learner, ["left", "right", "up"])
    restored = Expansion(held_out="nearest")
    restored.load_state_dict(expansion.state_dict(), learner)
    unheard = replace(TASKS["down-right"], instructions=("fetch some water", "bring water"))
    for one in (expansion, restored):
        assert_same(acting_in(one, learner, "down-right"), left_with["right"])  # "go right" in "go down and right"
        assert_same(acting_in(one, learner, "up-left"), left_with["left"])  # as like as "go up", and taught before it
        assert_same(one.policy_for(unheard, learner), base)
