import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from perennial.mechanism import measures


def orthogonal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


@hypothesis.given(st.integers(1, 8), st.floats(1e-6, 1e6))
def test_k_equal_singular_values_have_effective_rank_k(k, size):
    assert measures.effective_rank(torch.full((k,), size)) == pytest.approx(k)


def test_effective_rank_in_closed_form():
    weights = torch.tensor([3.0, 1.0])
    assert measures.effective_rank(weights) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert measures.effective_rank(torch.zeros(0)) == 0


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_update_by_k_equal_orthogonal_directions_has_rank_k(k):
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((10, 8)))
    update = 0.3 * orthogonal(rng, 10, k) @ orthogonal(rng, 8, k).T
    values = measures.singular_values(base, base + torch.from_numpy(update))
    assert len(values) == k
    assert measures.effective_rank(values) == pytest.approx(k)


def test_an_identity_has_full_rank():
    values = measures.singular_values(torch.zeros(5, 5), torch.eye(5))
    assert measures.effective_rank(values) == pytest.approx(5)
    assert measures.singular_values(torch.eye(5), torch.eye(5)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_adds_no_rank(dtype):
    """A low-rank update that is merged into large weights: what is stored differs from it in every direction."""
    rng = np.random.default_rng(1)
    base = torch.from_numpy(rng.standard_normal((40, 30))).to(dtype)
    update = torch.from_numpy(orthogonal(rng, 40, 4) @ orthogonal(rng, 30, 4).T)
    learned = (base.double() + update).to(dtype)
    assert np.linalg.matrix_rank((learned.double() - base.double()).numpy()) == 30
    values = measures.singular_values(base, learned)
    assert len(values) == 4
    assert measures.effective_rank(values) == pytest.approx(4, rel=1e-3)


def weights(rng):
    shapes = {"a": (6, 4), "b": (3, 2, 2), "same": (4, 4), "row": (1, 5), "bias": (6,)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def test_norms_agree_with_numpy():
    rng = np.random.default_rng(2)
    base, moved = weights(rng), weights(rng)
    learned = {name: base[name] if name == "same" else base[name] + 0.1 * moved[name] for name in base}
    tensors = [{name: torch.from_numpy(value) for name, value in side.items()} for side in (base, learned)]
    names = list(base)
    changed = measures.spectra(*tensors)
    assert list(changed) == ["a", "b"]
    found = measures.weight_update(*tensors, changed, names)

    deltas = {name: learned[name] - base[name] for name in names}
    size = np.sqrt(sum((delta**2).sum() for delta in deltas.values()))
    nuclear = [np.linalg.norm(deltas[name].reshape(len(deltas[name]), -1), "nuc") for name in ("a", "b")]
    ranks = []
    for name in ("a", "b"):
        values = np.linalg.svd(deltas[name].reshape(len(deltas[name]), -1), compute_uv=False)
        share = values / values.sum()
        ranks.append(np.exp(-(share * np.log(share)).sum()))
    assert found.frobenius == pytest.approx(size)
    assert found.relative == pytest.approx(size / np.sqrt(sum((value**2).sum() for value in base.values())))
    assert found.matrices == 2
    assert (found.nuclear, found.nuclear_std) == pytest.approx((np.mean(nuclear), np.std(nuclear)))
    assert (found.rank, found.rank_std) == pytest.approx((np.mean(ranks), np.std(ranks)))


def test_what_did_not_change_has_no_rank():
    same = {"a": torch.ones(2, 2)}
    found = measures.weight_update(same, same, measures.spectra(same, same), ["a"])
    assert found == measures.WeightUpdate(0.0, 0.0, 0, None, None, None, None)


def test_fisher_energy_by_hand():
    base = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0]), "c": torch.tensor([5.0])}
    learned = {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([3.0]), "c": torch.tensor([9.0])}
    fisher = {"a": torch.tensor([0.5, 0.25]), "b": torch.tensor([1.0]), "c": torch.tensor([100.0])}
    found = measures.fisher_energy(fisher, base, learned, ["a", "b"])
    energy = 0.5 * 1 + 0.25 * 4 + 1.0 * 9
    assert found.energy == pytest.approx(energy)
    assert found.share == pytest.approx(energy / (1.0 * 14))
    assert found.ratio == pytest.approx(energy / (1.75 / 3 * 14))


@hypothesis.given(st.integers(0, 50), st.floats(1e-3, 1e3))
def test_normalised_energy_knows_no_scale_and_is_at_most_1(seed, size):
    rng = np.random.default_rng(seed)
    base = {"a": torch.zeros(7, dtype=torch.float64)}
    update = {"a": torch.from_numpy(rng.standard_normal(7))}
    fisher = {"a": torch.from_numpy(rng.random(7) ** 4)}
    one = measures.fisher_energy(fisher, base, update, ["a"])
    other = measures.fisher_energy({"a": size * fisher["a"]}, base, {"a": 3 * update["a"]}, ["a"])
    assert (other.share, other.ratio) == pytest.approx((one.share, one.ratio))
    assert 0 < one.share <= 1
    assert measures.fisher_energy({"a": torch.ones(7)}, base, update, ["a"]).ratio == pytest.approx(1)


def test_without_update_or_information_there_is_no_share():
    zero, one = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    assert measures.fisher_energy(one, one, one, ["a"]) == measures.FisherEnergy(0.0, None, None)
    assert measures.fisher_energy(zero, zero, one, ["a"]) == measures.FisherEnergy(0.0, None, None)


def test_divergence_agrees_with_numpy_and_leaves_masked_tokens_out():
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((2, 4, 3, 5))
    mask = rng.random((4, 3)) < 0.6
    assert 0 < mask.sum() < 12
    p, q = (np.exp(x / 0.7) / np.exp(x / 0.7).sum(-1, keepdims=True) for x in (first, second))
    expected = (p * np.log(p / q)).sum(-1)[mask].mean()
    tensors = torch.from_numpy(first), torch.from_numpy(second)
    assert measures.divergence(*tensors, torch.from_numpy(mask), 0.7) == pytest.approx(expected)
    assert measures.divergence(tensors[0], tensors[0], torch.from_numpy(mask), 0.7) == 0
    assert measures.divergence(*tensors, torch.zeros(4, 3, dtype=torch.bool), 0.7) == 0
