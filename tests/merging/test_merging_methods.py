"""The merge methods against closed forms and against plain NumPy written from the papers."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from perennial.errors import PerennialError
from perennial.merging.dare import dare, keep_mask
from perennial.merging.ema import ema
from perennial.merging.fisher import fisher_average
from perennial.merging.linear import average, linear, linear_by_group
from perennial.merging.slerp import slerp
from perennial.merging.state_dicts import BLOCK
from perennial.merging.task_arithmetic import task_arithmetic
from perennial.merging.ties import ties, trim_threshold

HALF_AND_FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
numbers = st.floats(-100, 100, width=32)
vectors = arrays(np.float32, 12, elements=numbers)
fractions = st.floats(0, 1)


def model(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "b.weight": (3, 2, 4), "c.bias": (11,), "d.scale": ()}
    return {name: (spread * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def flat(state: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.double().flatten() for tensor in state.values()]).numpy()


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and left[n].flatten().view(torch.uint8).tolist() == right[n].flatten().view(torch.uint8).tolist()
        for n in left
    )


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("merge", [linear, slerp, lambda b, f, a: task_arithmetic(b, [f], [a])])
def test_the_ends_are_the_models_bit_for_bit(merge, dtype):
    base, finetuned = model(1, dtype), model(2, dtype)
    base["c.bias"][:2] = torch.tensor([-0.0, 1e-7])
    assert same_bits(merge(base, finetuned, 0.0), base)
    assert same_bits(merge(base, finetuned, 1.0), finetuned)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 1.7])
def test_linear_is_computed_in_float32_and_rounded_once(dtype, alpha):
    base, finetuned = model(1, dtype), model(2, dtype)
    merged = linear(base, finetuned, alpha, extrapolate=True)
    for name, tensor in merged.items():
        exact = (1 - alpha) * base[name].double() + alpha * finetuned[name].double()
        assert tensor.dtype == dtype
        resolution = torch.finfo(dtype).eps / 2 * 1.01 + (2e-7 if dtype != torch.float64 else 1e-15)
        scale = base[name].abs().double() + finetuned[name].abs().double()
        assert bool(((tensor.double() - exact).abs() <= resolution * exact.abs() + 3e-7 * scale * (alpha + 1)).all())
        if dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(tensor, torch.lerp(base[name].float(), finetuned[name].float(), alpha).to(dtype))


@given(vectors, vectors, vectors, fractions, numbers)
def test_linear_is_linear(x, y, z, alpha, factor):
    def merge(left, right):
        return linear({"w": torch.from_numpy(left).double()}, {"w": torch.from_numpy(right).double()}, alpha)[
            "w"
        ].numpy()

    np.testing.assert_allclose(merge(x + z, y + z), merge(x, y) + z, rtol=0, atol=1e-4)
    wide = [v.astype(np.float64) for v in (x, y)]
    np.testing.assert_allclose(merge(wide[0] * factor, wide[1] * factor), merge(*wide) * factor, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merge(*wide) + merge(*wide[::-1]), wide[0] + wide[1], rtol=1e-9, atol=1e-9)


@given(vectors, st.floats(0, 1), st.sampled_from(HALF_AND_FULL))
def test_a_model_merged_with_itself_is_itself(x, alpha, dtype):
    state = {"w": torch.from_numpy(x).to(dtype)}
    twin = {"w": state["w"].clone()}
    assert same_bits(linear(state, twin, alpha), state)
    assert same_bits(slerp(state, twin, alpha), state)
    assert same_bits(ties(state, [twin, twin]), state)
    assert same_bits(dare(state, [twin], alpha), state)
    assert same_bits(average([state, twin, twin]), state)


def test_groups_of_equal_coefficients_are_the_global_merge_and_each_group_has_its_own():
    base, finetuned = model(1), model(2)
    groups = {"a.weight": "vision", "b.weight": "language", "c.bias": "language", "d.scale": "action"}
    equal = linear_by_group(base, finetuned, {"vision": 0.8, "language": 0.8, "action": 0.8}, groups)
    assert same_bits(equal, linear(base, finetuned, 0.8))
    mixed = linear_by_group(base, finetuned, {"vision": 1, "language": 0.8, "action": 0}, groups)
    assert torch.equal(mixed["a.weight"], finetuned["a.weight"])
    assert torch.equal(mixed["c.bias"], linear(base, finetuned, 0.8)["c.bias"])
    assert torch.equal(mixed["d.scale"], base["d.scale"])
    with pytest.raises(PerennialError, match="No tensor belongs to the group 'gripper'"):
        linear_by_group(base, finetuned, {"vision": 1, "language": 1, "action": 1, "gripper": 1}, groups)
    with pytest.raises(PerennialError, match="have no coefficient"):
        linear_by_group(base, finetuned, {"vision": 1}, groups)


def test_a_sequence_of_merges_dilutes_the_base_geometrically():
    base, merged = model(0), model(0)
    for task in range(1, 6):
        merged = linear(merged, model(task), 0.3)
    weights = [0.7**5] + [0.3 * 0.7 ** (5 - task) for task in range(1, 6)]
    expected = sum(weight * flat(model(seed)) for seed, weight in enumerate(weights))
    np.testing.assert_allclose(flat(merged), expected, atol=1e-6)
    assert same_bits(base, model(0)), "merging must not change its inputs"


@given(st.permutations([1, 2, 3, 4]))
def test_the_order_of_the_models_does_not_matter(order):
    base, models = model(0), [model(seed) for seed in order]
    straight = [model(seed) for seed in (1, 2, 3, 4)]
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(flat(average(models)), flat(average(straight)), **close)
    np.testing.assert_allclose(flat(ties(base, models, 0.7)), flat(ties(base, straight, 0.7)), **close)
    sums = [flat(task_arithmetic(base, group, [0.3] * 4)) for group in (models, straight)]
    np.testing.assert_allclose(*sums, **close)
    fishers = {seed: {n: t.abs() for n, t in model(seed + 10).items()} for seed in order}
    weighted = [
        fisher_average(group, [fishers[s] for s in seeds])
        for group, seeds in ((models, order), (straight, (1, 2, 3, 4)))
    ]
    np.testing.assert_allclose(*map(flat, weighted), **close)


@pytest.mark.parametrize("coefficients", [(0.4, 0.3), (1.0, -1.0), (2.0, 0.5)])
def test_task_arithmetic_adds_task_vectors(coefficients):
    base, models = model(0), [model(1), model(2)]
    merged = task_arithmetic(base, models, coefficients)
    expected = flat(base) + sum(c * (flat(m) - flat(base)) for c, m in zip(coefficients, models, strict=True))
    np.testing.assert_allclose(flat(merged), expected, atol=1e-6)


def test_unlearning_a_task_undoes_learning_it():
    base, tuned = model(0), model(1)
    negated = task_arithmetic(base, [tuned, tuned], [1.0, -1.0])
    np.testing.assert_allclose(flat(negated), flat(base), atol=1e-6)


@given(st.integers(2, 50), fractions, st.floats(0.1, 3.0))
def test_slerp_keeps_the_norm_and_moves_by_the_fraction_of_the_angle(size, alpha, angle):
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.normal(size=(size, 2)))[0].T
    base, finetuned = 5 * basis[0], 5 * (math.cos(angle) * basis[0] + math.sin(angle) * basis[1])
    merged = slerp({"w": torch.from_numpy(base)}, {"w": torch.from_numpy(finetuned)}, alpha)["w"].numpy()
    assert np.linalg.norm(merged) == pytest.approx(5, rel=1e-9)
    expected = 5 * (math.cos(alpha * angle) * basis[0] + math.sin(alpha * angle) * basis[1])
    np.testing.assert_allclose(merged, expected, atol=1e-7)


@pytest.mark.parametrize("other", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]], ids=["parallel", "opposite", "zero"])
def test_slerp_is_linear_where_there_is_no_great_circle(other):
    base, finetuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor(other)}
    assert torch.equal(slerp(base, finetuned, 0.25)["w"], linear(base, finetuned, 0.25)["w"])


@given(vectors, st.floats(0.01, 1.0))
def test_the_trim_threshold_is_the_exact_order_statistic(x, density):
    keep = max(1, round(density * x.size))
    pieces = [torch.from_numpy(part.copy()) for part in np.array_split(x, 5)]
    assert trim_threshold(lambda: pieces, density) == np.sort(np.abs(x))[::-1][keep - 1]


def ties_by_hand(base: np.ndarray, models: list[np.ndarray], density: float, alpha: float) -> np.ndarray:
    """Algorithm 1 of arXiv 2306.01708, parameter by parameter."""
    vectors = []
    for tuned in models:
        tau = tuned - base
        order = np.argsort(-np.abs(tau), kind="stable")
        trimmed = np.zeros_like(tau)
        kept = order[: max(1, round(density * tau.size))]
        trimmed[kept] = tau[kept]
        vectors.append(trimmed)
    merged = base.copy()
    for p in range(base.size):
        entries = [tau[p] for tau in vectors]
        positive, negative = sum(e for e in entries if e > 0), -sum(e for e in entries if e < 0)
        if positive != negative:
            sign = 1 if positive > negative else -1
            agreeing = [e for e in entries if e * sign > 0]
            merged[p] += alpha * sum(agreeing) / len(agreeing)
    return merged


@pytest.mark.parametrize(("density", "alpha", "count"), [(0.2, 1.0, 3), (0.5, 0.4, 2), (1.0, 1.0, 4), (0.05, 2.0, 1)])
def test_ties_is_the_paper_s_algorithm(density, alpha, count):
    base, models = model(0), [model(seed) for seed in range(1, count + 1)]
    merged = ties(base, models, alpha, density=density)
    np.testing.assert_allclose(
        flat(merged), ties_by_hand(flat(base), [flat(m) for m in models], density, alpha), atol=2e-6
    )


def test_dare_is_the_paper_s_formula_on_its_own_masks():
    base, models, drop, seed = model(0), [model(1), model(2)], 0.6, 17
    merged = dare(base, models, 0.7, drop=drop, seed=seed)
    for name, tensor in base.items():
        expected = tensor.double().numpy().copy()
        for number, tuned in enumerate(models):
            kept = keep_mask(seed, name, number, 0, tensor.numel(), drop).numpy().reshape(tensor.shape)
            delta = tuned[name].double().numpy() - tensor.double().numpy()
            expected += 0.7 * np.where(kept, delta / (1 - drop), 0)
        np.testing.assert_allclose(merged[name].numpy(), expected, atol=1e-6)


def test_dare_masks_are_bernoulli_independent_and_repeatable():
    size = 200_000
    first, again = (keep_mask(3, "w", 0, 0, size, 0.9) for _ in range(2))
    others = [keep_mask(*key, size, 0.9) for key in ((4, "w", 0, 0), (3, "v", 0, 0), (3, "w", 1, 0), (3, "w", 0, 1))]
    assert torch.equal(first, again)
    deviation = math.sqrt(0.1 * 0.9 / size)
    assert abs(first.float().mean().item() - 0.1) < 5 * deviation
    for other in others:
        both = (first & other).float().mean().item()
        assert abs(both - 0.01) < 5 * math.sqrt(0.01 * 0.99 / size)


def test_dare_masks_every_block_of_a_large_tensor_by_itself():
    size = BLOCK + 1000
    base, tuned = {"w": torch.zeros(size)}, {"w": torch.ones(size)}
    merged = dare(base, [tuned], drop=0.5, seed=2)["w"]
    assert torch.equal(merged[:BLOCK], 2.0 * keep_mask(2, "w", 0, 0, BLOCK, 0.5))
    assert torch.equal(merged[BLOCK:], 2.0 * keep_mask(2, "w", 0, 1, 1000, 0.5))


def test_dare_without_dropping_is_task_arithmetic():
    base, models = model(0), [model(1), model(2)]
    np.testing.assert_allclose(
        flat(dare(base, models, 0.3, drop=0)), flat(task_arithmetic(base, models, [0.3, 0.3])), atol=1e-6
    )


def test_fisher_weights_are_information_and_fall_back_to_the_plain_average():
    models = [{"w": torch.tensor([1.0, 1.0, 1.0, 8.0])}, {"w": torch.tensor([3.0, 3.0, 3.0, 2.0])}]
    fishers = [{"w": torch.tensor([1.0, 0.0, 0.0, 3.0])}, {"w": torch.tensor([1.0, 5.0, 0.0, 1.0])}]
    assert fisher_average(models, fishers)["w"].tolist() == [2.0, 3.0, 2.0, 6.5]
    assert fisher_average(models, fishers, [3.0, 1.0])["w"].tolist() == pytest.approx([1.5, 3.0, 1.5, 7.4])
    with pytest.raises(PerennialError, match="negative or NaN in w"):
        fisher_average(models, [fishers[0], {"w": torch.full((4,), math.nan)}])


@given(st.lists(st.floats(0, 10, width=32), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.01))
def test_a_uniform_fisher_gives_the_weighted_soup(weights):
    models = [model(seed, torch.float64) for seed in (1, 2, 3)]
    ones = {name: torch.ones_like(tensor) for name, tensor in models[0].items()}
    expected = sum(w * flat(m) for w, m in zip(weights, models, strict=True)) / sum(weights)
    np.testing.assert_allclose(flat(average(models, weights)), expected, atol=1e-9)
    np.testing.assert_allclose(flat(fisher_average(models, [ones] * 3, weights)), expected, atol=1e-9)


def test_ema_is_the_closed_form():
    average_, steps = model(0), 50
    for _ in range(steps):
        average_ = ema(average_, model(1), 0.9)
    expected = 0.9**steps * flat(model(0)) + (1 - 0.9**steps) * flat(model(1))
    np.testing.assert_allclose(flat(average_), expected, atol=1e-5)
    assert same_bits(ema(model(0), model(1), 1.0), model(0))
    assert same_bits(ema(model(0), model(1), 0.0), model(1))


def test_what_did_not_change_stays_whatever_its_value_and_counters_come_from_the_base():
    base, tuned = model(0), model(1)
    for state, count in ((base, 4), (tuned, 9)):
        state["mask"] = torch.full((3, 3), -math.inf).triu(1)
        state["ids"] = torch.arange(5)
        state["count"] = torch.tensor(count)
    for merged in (linear(base, tuned, 0.4), slerp(base, tuned, 0.4), ties(base, [tuned]), dare(base, [tuned])):
        assert torch.equal(merged["mask"], base["mask"])
        assert torch.equal(merged["ids"], base["ids"])
        assert merged["count"].item() == 4
    assert linear(base, tuned, 1.0)["count"].item() == 9


def test_the_result_has_the_base_s_types():
    base, tuned = model(0, torch.bfloat16), model(1, torch.float32)
    for merged in (linear(base, tuned, 0.4), linear(base, tuned, 1.0), slerp(base, tuned, 0.4), ties(base, [tuned])):
        assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    exact = torch.lerp(base["a.weight"].float(), tuned["a.weight"], 0.4).bfloat16()
    assert torch.equal(linear(base, tuned, 0.4)["a.weight"], exact)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (lambda b, f: linear(b, f, 1.2), r"alpha is 1.2, but it must lie in \[0, 1\]; beyond it"),
        (lambda b, f: linear(b, f, -0.1), "alpha is -0.1"),
        (lambda b, f: linear(b, f, math.nan, extrapolate=True), "alpha is nan"),
        (lambda b, f: slerp(b, f, 2), "alpha is 2"),
        (lambda b, f: ema(b, f, 1.01), "decay is 1.01"),
        (lambda b, f: ties(b, [f], density=0), "density is 0"),
        (lambda b, f: ties(b, []), "at least one"),
        (lambda b, f: dare(b, [f], drop=1.0), "drop rate is 1.0"),
        (lambda b, f: task_arithmetic(b, [f], [1, 2]), "coefficients"),
        (lambda b, f: average([b, f], [0, 0]), "cannot be averaged"),
        (lambda b, f: average([b, f], [1, -1]), "cannot be averaged"),
        (lambda b, f: linear(b, {**f, "ids": torch.arange(4).int()}, 0.5), "not in the base"),
        (
            lambda b, f: linear({**b, "q": torch.arange(4)}, {**f, "q": torch.arange(4) + 1}, 0.5),
            "q is of type torch.int64",
        ),
    ],
)
def test_bad_input_is_one_sentence(merge, message):
    with pytest.raises(PerennialError, match=message):
        merge(model(0), model(1))


def test_the_first_ten_differences_are_listed():
    base = {f"layer.{i}": torch.zeros(2) for i in range(20)}
    tuned = {name: torch.zeros(3) for name in list(base)[:19]} | {"extra": torch.zeros(1)}
    with pytest.raises(PerennialError) as caught:
        linear(base, tuned, 0.5)
    sentence = str(caught.value)
    assert "21 tensors differ: layer.19 is missing, extra is not in the base, layer.0 is [3] instead of [2]" in sentence
    assert "layer.7 is" in sentence
    assert "layer.8 is" not in sentence
