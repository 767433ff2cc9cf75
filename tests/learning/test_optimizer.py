import numpy as np
import pytest
import torch

from perennial.errors import PerennialError
from perennial.learning.base import gradient_step
from perennial.learning.optimizer import AdamWConfig, build_optimizer, height, set_learning_rate
from perennial.policies.lora import set_trainable
from perennial.strategies.base import ParameterGroup, Strategy
from perennial.strategies.composition import Strategies
from perennial.testing.toy import ToyPolicy


class ByName(Strategy):
    """The head learns ten times slower."""

    name = "by_name"

    def parameter_groups(self, policy):
        own = policy.trainable()
        head = {name: p for name, p in own.items() if name.startswith("head.")}
        rest = {name: p for name, p in own.items() if name not in head}
        return [ParameterGroup(rest), ParameterGroup(head, scale=0.1)]


class Forgetful(Strategy):
    name = "forgetful"

    def parameter_groups(self, policy):
        return [ParameterGroup({"head.bias": policy.trainable()["head.bias"]})]


def test_warm_up_rises_linearly_and_scales_every_group():
    policy = ToyPolicy()
    config = AdamWConfig(learning_rate=0.8, warmup_steps=4, max_grad_norm=1e9)
    optimizer = build_optimizer(policy, Strategies((ByName(),)), config)
    seen = []
    for _ in range(6):
        set_learning_rate(optimizer, config)
        seen.append([group["lr"] for group in optimizer.param_groups])
        for parameter in policy.trainable().values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    rises = np.array([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(seen, np.stack([0.8 * rises, 0.08 * rises], axis=1), rtol=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    config = AdamWConfig(learning_rate=0.5, warmup_steps=0)
    optimizer = build_optimizer(ToyPolicy(), Strategies(), config)
    set_learning_rate(optimizer, config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_the_cosine_begins_after_the_warm_up_and_ends_at_the_final_rate():
    config = AdamWConfig(learning_rate=2.0, warmup_steps=4, decay_steps=12, final_learning_rate=0.5)
    found = [2.0 * height(config, step) for step in range(20)]
    np.testing.assert_allclose(found[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(found[6], 0.5 + 1.5 * (1 + 2**-0.5) / 2)  # a quarter of the way
    np.testing.assert_allclose(found[8], 1.25)
    np.testing.assert_allclose(found[12:], 0.5)
    np.testing.assert_array_less(found[5:13], found[4:12])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"warmup_steps": 12, "decay_steps": 12}, "decay_steps is 12"), ({"final_learning_rate": 2.0}, "above the")],
)
def test_a_schedule_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(PerennialError, match=said):
        AdamWConfig(**changes).check()
    AdamWConfig(warmup_steps=12, decay_steps=13, final_learning_rate=1e-4).check()


def test_the_warm_up_goes_on_after_the_optimiser_was_restored():
    config = AdamWConfig(learning_rate=1.0, warmup_steps=10)
    first, second = (build_optimizer(ToyPolicy(), Strategies(), config) for _ in range(2))
    for group in first.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, config)
    assert second.param_groups[0]["lr"] == pytest.approx(0.4)


def test_the_first_step_of_adamw_moves_each_weight_by_its_groups_rate(toy_batch):
    policy = ToyPolicy()
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    config = AdamWConfig(learning_rate=0.4, warmup_steps=4, max_grad_norm=1e9, eps=1e-30)
    optimizer = build_optimizer(policy, Strategies((ByName(),)), config)

    def loss(outputs):
        return outputs.imitation_loss.sum(), {}

    gradient_step(policy, toy_batch, loss, Strategies(), optimizer, config, np.random.default_rng(0))
    moved = 0
    for name, parameter in policy.trainable().items():
        rate = 0.01 if name.startswith("head.") else 0.1
        # Bias-corrected first step of Adam: the moments are g and g^2, so the step is lr * sign(g).
        expected = before[name] - rate * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
        moved += 1
    assert moved == 10


def test_groups_that_miss_a_parameter_are_refused():
    with pytest.raises(PerennialError, match=r"misses parameters such as .*head.weight"):
        build_optimizer(ToyPolicy(), Strategies((Forgetful(),)), AdamWConfig())


def test_nothing_to_train_is_refused():
    policy = ToyPolicy()
    set_trainable(policy, ())
    with pytest.raises(PerennialError, match="nothing to train"):
        build_optimizer(policy, Strategies(), AdamWConfig())


def test_two_strategies_cannot_both_set_learning_rates():
    with pytest.raises(PerennialError, match="both set learning rates"):
        Strategies((ByName(), ByName())).parameter_groups(ToyPolicy())
