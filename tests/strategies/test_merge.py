import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.errors import PerennialError
from perennial.policies.lora import base_name
from perennial.randomness import stream
from perennial.strategies._weights import average_factors, between, looking_through, restore, snapshot
from perennial.strategies.l2 import L2
from perennial.strategies.merge import Merge
from strategies.worlds import TASKS, no_episodes, policy, shake


def learn(merge, learner, seed):
    """Acting weights before, after learning, and after merging."""
    merge.before_task(TASKS["left"], learner)
    before = learner.acting_weights()
    shake(learner, seed)
    learned = learner.acting_weights()
    merge.after_task(TASKS["left"], learner, no_episodes)
    return before, learned, learner.acting_weights()


def assert_same(left, right, **tolerance):
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("adapter", [False, True])
def test_alpha_0_keeps_the_old_and_alpha_1_the_new_weights_exactly(adapter):
    learner = policy(adapter)
    learn(Merge(alpha=0.6), learner, seed=1)
    before, _, merged = learn(Merge(alpha=0.0), learner, seed=2)
    assert_same(merged, before)
    _, learned, merged = learn(Merge(alpha=1.0), learner, seed=3)
    assert_same(merged, learned)


def test_full_fine_tuning_is_averaged_exactly_task_after_task():
    learner, merge = policy(), Merge(alpha=0.25)
    for seed in range(3):
        before, learned, merged = learn(merge, learner, seed)
        assert_same(merged, {n: 0.75 * before[n] + 0.25 * learned[n] for n in before}, rtol=1e-6, atol=1e-7)


def test_the_first_adapter_is_averaged_exactly():
    learner = policy(adapter=True)
    before, learned, merged = learn(Merge(alpha=0.25), learner, seed=0)
    assert_same(merged, {n: 0.75 * before[n] + 0.25 * learned[n] for n in before}, rtol=1e-5, atol=1e-6)


def test_later_adapters_become_the_nearest_ones_of_their_rank():
    learner, base, merge = policy(adapter=True), policy().acting_weights(), Merge(alpha=0.4)
    learn(merge, learner, seed=0)
    before, learned, merged = learn(merge, learner, seed=1)
    for name in (name for name in base if name.endswith("weight")):
        average = (0.6 * before[name] + 0.4 * learned[name] - base[name]).double().numpy()
        u, s, v = np.linalg.svd(average, full_matrices=False)
        nearest = (u[:, :3] * s[:3]) @ v[:3]
        np.testing.assert_allclose((merged[name] - base[name]).numpy(), nearest, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_parameter_groups_can_differ(adapter):
    learner = policy(adapter)
    before, learned, merged = learn(Merge(alpha=0.5, vision=1.0, language=0.0), learner, seed=0)
    torch.testing.assert_close(merged["vision.weight"], learned["vision.weight"])
    torch.testing.assert_close(merged["language.weight"], before["language.weight"])
    middle = (before["head.weight"] + learned["head.weight"]) / 2
    torch.testing.assert_close(merged["head.weight"], middle, rtol=1e-5, atol=1e-6)


def test_no_direction_of_the_adapter_dies():
    rng = stream(0, "factors")
    b, a = (torch.from_numpy(rng.normal(0, 1, shape)).float() for shape in ((10, 4), (4, 8)))
    for old, new in ((torch.zeros(10, 4), torch.zeros(10, 4)), (torch.zeros(10, 4), b), (b, -b)):
        up, down = average_factors((old, a), (new, a), alpha=0.5)
        torch.testing.assert_close(up, (old + new) / 2)
        torch.testing.assert_close(down, a)
    up, down = average_factors((b, a), (b, -a), alpha=0.3)
    torch.testing.assert_close(up @ down, 0.4 * b @ a, rtol=1e-4, atol=1e-5)
    assert torch.linalg.svdvals(down)[-1] >= 0.5 * torch.linalg.svdvals(0.4 * a)[-1]


SIZES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(out=SIZES, rank=SIZES, into=SIZES, alpha=st.floats(1e-3, 1 - 1e-3), step=st.sampled_from([0.02, 1.0]))
def test_factors_have_the_nearest_product_and_stay_by_those_that_were_averaged(out, rank, into, alpha, step):
    rng = stream(2, "factors", out, rank, into)
    shapes = (out, rank), (rank, into)
    old = tuple(torch.from_numpy(rng.normal(0, 1, shape)).float() for shape in shapes)
    new = tuple(f + step * torch.from_numpy(rng.normal(0, 1, f.shape)).float() for f in old)
    up, down = average_factors(old, new, alpha)
    products = [(b.double() @ a.double()).numpy() for b, a in (old, new, (up, down))]
    average = (1 - alpha) * products[0] + alpha * products[1]
    u, s, v = np.linalg.svd(average)
    nearest = (u[:, : len(s)] * s)[:, :rank] @ v[: len(s)][:rank]
    size = max(float(b.norm() * a.norm()) for b, a in (old, new, (up, down)))
    np.testing.assert_allclose(products[2], nearest, rtol=0, atol=2e-6 * size)
    middle = torch.lerp(old[1], new[1], alpha)
    assert float(torch.linalg.svdvals(down)[-1]) >= 0.499 * float(torch.linalg.svdvals(middle)[-1]) - 1e-5
    # At the ends they become the factors themselves, and on the way there is no jump.
    for end, near in ((old, 1e-6), (new, 1 - 1e-6)):
        for factor, found in zip(end, average_factors(old, new, near), strict=True):
            torch.testing.assert_close(found, factor, rtol=0, atol=1e-2 * step)


def test_what_was_measured_at_factors_stays_valid_after_a_merge():
    learner, l2 = policy(adapter=True), L2(coefficient=2.0, anchor="base")
    l2.before_task(TASKS["left"], learner)
    shake(learner, seed=1)
    before = snapshot(learner)
    shake(learner, seed=2)
    far = float(l2.penalty(learner).detach())
    for alpha in (0.25, 0.5, 0.75, 1 - 1e-6):
        merged = between(before, snapshot(learner), lambda _, alpha=alpha: alpha)
        with looking_through(learner, merged):
            assert float(l2.penalty(learner).detach()) < 1.2 * far
    assert float(l2.penalty(learner).detach()) == far
    with looking_through(learner, merged):
        assert float(l2.penalty(learner).detach()) == pytest.approx(far, rel=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (8, 1), (2, 2), (9, 7)])
def test_layers_smaller_than_the_rank_lose_nothing(rows, columns):
    rng = stream(1, "factors")
    pairs = [[torch.from_numpy(rng.normal(0, 1, s)).float() for s in ((rows, 4), (4, columns))] for _ in range(2)]
    up, down = average_factors(*pairs, alpha=0.3)
    assert up.shape == (rows, 4)
    assert down.shape == (4, columns)
    exact = 0.7 * pairs[0][0] @ pairs[0][1] + 0.3 * pairs[1][0] @ pairs[1][1]
    if min(rows, columns) <= 4:
        torch.testing.assert_close(up @ down, exact, rtol=1e-4, atol=1e-5)
    else:
        assert 0 < (up @ down - exact).norm() < exact.norm()


@pytest.mark.parametrize("wrong", [{"alpha": 1.2}, {"language": -0.1}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(PerennialError, match="between 0 and 1"):
        Merge(**wrong)


def update(learner):
    """The effective update of every adapted layer: twice B A, as alpha is twice the rank."""
    weights = dict(learner.model.named_parameters())
    ups = [name for name in weights if ".lora_B." in name]
    return {base_name(up): 2 * (weights[up] @ weights[up.replace("lora_B", "lora_A")]).detach() for up in ups}


def test_fresh_adapters_add_up_on_the_base_as_in_the_formula_of_the_paper():
    learner, base, merge, parts = policy(adapter=True), policy().acting_weights(), Merge(0.4, variant="ut2026"), []
    for seed, task in enumerate(("left", "up", "right")):
        merge.before_task(TASKS[task], learner)
        shake(learner, seed, size=0.3)
        parts.append(update(learner))
        merge.after_task(TASKS[task], learner, no_episodes)
        for name in parts[0]:
            expected = base[name] + 0.4 * sum(part[name] for part in parts)
            torch.testing.assert_close(learner.acting_weights()[name], expected, rtol=1e-5, atol=1e-6)
    total = (learner.acting_weights()["trunk.weight"] - base["trunk.weight"]).double()
    assert torch.linalg.matrix_rank(total, rtol=1e-5) == 9  # three adapters of rank 3


def test_a_fresh_adapter_begins_where_the_last_one_ended():
    learner, merge = policy(adapter=True), Merge(variant="ut2026")
    _, _, merged = learn(merge, learner, seed=0)
    old = snapshot(learner)
    merge.before_task(TASKS["up"], learner)
    assert_same(learner.acting_weights(), merged)
    for name, value in snapshot(learner).items():
        if ".lora_B." in name:
            assert old[name].any()
            assert not value.any()
        else:
            assert value.std() == pytest.approx(1 / 3, rel=0.5)  # Gaussian, 1 / rank
            assert not torch.isclose(value, old[name]).any()


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_what_was_folded_comes_back_exactly(tasks):
    learner, merge = policy(adapter=True), Merge(variant="ut2026")
    for seed in range(tasks):
        learn(merge, learner, seed)
    other, loaded = policy(adapter=True), Merge(variant="ut2026")
    restore(other, snapshot(learner))
    loaded.load_state_dict(merge.state_dict(), other)
    for each, strategy in ((learner, merge), (other, loaded)):
        strategy.before_task(TASKS["right"], each)
        shake(each, seed=9)
        strategy.after_task(TASKS["right"], each, no_episodes)
    assert_same(other.acting_weights(), learner.acting_weights())
    assert_same(loaded.state_dict(), merge.state_dict())
    assert bool(merge.weights) == (tasks > 2)  # from then on the weights take less room than the adapters


def test_without_an_adapter_there_is_nothing_to_fold():
    one, other = policy(), policy()
    for seed in range(2):
        learn(Merge(alpha=0.3), one, seed)
        learn(Merge(alpha=0.3, variant="ut2026"), other, seed)
    assert_same(one.acting_weights(), other.acting_weights())
