import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perennial.policies._base_identity import PIECE, PIECES, identity, sample, spans


@given(st.integers(1, 10 * PIECES * PIECE))
def test_the_spans_lie_in_order_within_the_matrix_and_touch_both_ends(count):
    found = spans(count)
    assert found[0][0] == 0
    assert found[-1][1] == count
    assert sum(stop - start for start, stop in found) == min(count, PIECES * PIECE)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))


def test_the_identity_is_a_hash_of_the_names_and_the_rounded_numbers():
    """1 + 2^-9 lies halfway between two numbers of bfloat16 and goes to the even one, 1."""
    record = identity({"b": torch.tensor([1.0 + 2**-9, -2.0]), "a": torch.tensor([0.5])})
    ones = bytes.fromhex("803f00c0")
    assert record == "sampled:" + hashlib.sha256(b"a 1 \x00\x3f" + b"b 2 " + ones).hexdigest()


def test_a_matrix_that_was_fine_tuned_a_little_is_another_one():
    """In bfloat16, where most numbers are too coarse to take a small step."""
    torch.manual_seed(0)
    before = torch.randn(600, 500).bfloat16()
    after = before + (1e-4 * torch.randn(600, 500)).bfloat16()
    assert (before != after).float().mean() < 0.1
    assert identity({"w": sample(before)}) == identity({"w": sample(before.float())})
    assert identity({"w": sample(before)}) != identity({"w": sample(after)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_type_in_memory_does_not_matter(dtype):
    torch.manual_seed(0)
    weights = torch.randn(33, 70).bfloat16()
    assert identity({"w": sample(weights.to(dtype))}) == identity({"w": sample(weights)})
