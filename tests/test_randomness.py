import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from perennial.randomness import integer_seed, stream

seeds = st.integers(0, 2**63 - 1)
keys = st.lists(st.one_of(st.text(max_size=8), st.integers(-(2**63), 2**63)), max_size=4)


@given(seeds, keys)
def test_the_same_name_gives_the_same_stream(seed, key):
    first, second = stream(seed, *key), stream(seed, *key)
    stream(seed, *key, "other").random(7)
    assert np.array_equal(first.random(16), second.random(16))


@given(seeds, keys, seeds, keys)
def test_different_names_give_different_streams(seed, key, other_seed, other_key):
    assume((seed, key) != (other_seed, other_key))
    assert not np.array_equal(stream(seed, *key).random(4), stream(other_seed, *other_key).random(4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", 2), ("a", "2")),
        (("a", 1, 2), ("a", 12)),
        (("a",), ("a", "")),
        (("a", 1, 2), ("a", 2, 1)),
        (("a,b",), ("a", "b")),
    ],
)
def test_names_that_look_alike_are_told_apart(one, other):
    assert not np.array_equal(stream(0, *one).random(4), stream(0, *other).random(4))


def test_neighbouring_streams_are_independent():
    """Numbers at the same place of streams that differ in one counter are uniform and uncorrelated."""
    draws = np.array([stream(0, "act", "reach", i).random(4) for i in range(2000)])
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(draws[:, 0], "uniform").pvalue > 0.01
    correlation = np.corrcoef(np.column_stack([draws[:-1], draws[1:]]), rowvar=False)
    assert np.abs(correlation - np.eye(8)).max() < 4 / np.sqrt(2000)


@pytest.mark.parametrize(
    ("seed", "key", "raw"),
    [
        (0, (), [16710456903995253619, 12328142120478475218]),
        (0, ("act", "reach-v3", 1, 0), [5943499181428594163, 3566243759662823392]),
        (1, ("act", "reach-v3", 1, 0), [2983366363106019167, 8146674259426766485]),
        (9223372036854775807, ("épisode", -1), [3954430134706102097, 15652833203768813600]),
    ],
)
def test_streams_never_change_between_releases(seed, key, raw):
    """Published numbers can be repeated only while these stay as they are; the raw words are Philox's own."""
    assert stream(seed, *key).bit_generator.random_raw(2).tolist() == raw


def test_draws_never_change_between_releases():
    assert stream(7, "draws").random(2).tolist() == [0.5484065988821905, 0.14784045902130827]
    assert stream(7, "draws").integers(1000, size=4).tolist() == [109, 548, 522, 147]
    assert stream(7, "draws").permutation(6).tolist() == [4, 2, 1, 3, 5, 0]
    assert integer_seed(7, "draws") == 5058158088956629778


@given(seeds, keys)
def test_integer_seeds_fit_in_63_bits(seed, key):
    value = integer_seed(seed, *key)
    assert 0 <= value < 2**63
    assert value == integer_seed(seed, *key)


def test_integer_seeds_do_not_collide():
    assert len({integer_seed(0, "env", i) for i in range(10_000)}) == 10_000
