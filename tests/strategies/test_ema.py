import pytest
import torch

from perennial.errors import PerennialError
from perennial.policies.lora import set_trainable
from perennial.strategies._weights import snapshot
from perennial.strategies.composition import Strategies
from perennial.strategies.ema import EMA
from perennial.strategies.merge import Merge
from perennial.strategies.retain import Retain
from strategies.worlds import TASKS, no_episodes, policy, shake


@pytest.mark.parametrize("adapter", [False, True])
def test_the_task_ends_with_the_moving_average_of_its_weights(adapter):
    learner, strategy = policy(adapter), EMA(decay=0.75)
    strategy.before_task(TASKS["left"], learner)
    expected = {name: p.detach().double().clone() for name, p in learner.trainable().items()}
    for seed in range(5):
        shake(learner, seed)
        strategy.after_step(learner)
        expected = {n: 0.75 * expected[n] + 0.25 * p.detach().double() for n, p in learner.trainable().items()}
    strategy.after_task(TASKS["left"], learner, no_episodes)
    for name, parameter in learner.trainable().items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-5)


def test_the_average_of_bfloat16_weights_follows_steps_that_bfloat16_would_round_away():
    learner, strategy = policy(), EMA(decay=0.99)
    learner.model.to(torch.bfloat16)
    strategy.before_task(TASKS["left"], learner)
    strategy.average = {name: torch.ones_like(value) for name, value in strategy.average.items()}
    for parameter in learner.trainable().values():
        parameter.data.fill_(1.0625)
    for _ in range(100):
        strategy.after_step(learner)
    expected = 1.0625 - 0.0625 * 0.99**100
    for value in strategy.average.values():
        torch.testing.assert_close(value, torch.full_like(value, expected), atol=1e-5, rtol=0)
    strategy.after_task(TASKS["left"], learner, no_episodes)
    assert {p.dtype for p in learner.trainable().values()} == {torch.bfloat16}


def test_merging_after_averaging_merges_the_average():
    learner, averaged = policy(), policy()
    start = {name: p.detach().clone() for name, p in learner.trainable().items()}
    both = Strategies((EMA(decay=0.5), Merge(alpha=0.25)))
    both.before_task(TASKS["left"], learner)
    shake(learner, 3)
    shake(averaged, 3)
    both.after_step(learner)
    both.after_task(TASKS["left"], learner, no_episodes)
    for name, parameter in learner.trainable().items():
        moved = averaged.trainable()[name] - start[name]
        torch.testing.assert_close(parameter, start[name] + 0.125 * moved)


def test_the_average_begins_where_a_later_strategy_lets_the_task_begin():
    learner, both = policy(), Strategies((EMA(decay=0.5), Retain(chain="parallel")))
    base = snapshot(learner)
    both.before_task(TASKS["left"], learner)
    shake(learner, 3)
    both.after_task(TASKS["left"], learner, no_episodes)
    shake(learner, 4)
    both.before_task(TASKS["up"], learner)
    average = both.members[0].state_dict()
    for name, value in base.items():
        torch.testing.assert_close(average[f"average/{name}"], value, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_keeps_nothing_new_is_refused(decay):
    with pytest.raises(PerennialError, match=rf"ema.decay is {decay}"):
        EMA(decay=decay)


def test_weights_that_a_stage_freezes_stay_as_they_are():
    learner, strategy = policy(), EMA(decay=0.5)
    strategy.before_task(TASKS["left"], learner)
    before = snapshot(learner)
    set_trainable(learner, ("action",))
    shake(learner, 3)
    strategy.after_step(learner)
    moved = set(learner.trainable())
    assert 0 < len(moved) < len(before)
    for name, parameter in learner.model.named_parameters():
        expected = (before[name] + parameter.detach()) / 2 if name in moved else before[name]
        torch.testing.assert_close(strategy.average[name], expected)
