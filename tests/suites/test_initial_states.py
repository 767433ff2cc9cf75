from hypothesis import given
from hypothesis import strategies as st

from perennial.suites.base import SPLITS, state_number

states = st.tuples(st.sampled_from(SPLITS), st.integers(0, 10**6))


@given(states, states)
def test_no_two_initial_states_have_the_same_number(one, other):
    assert (state_number(*one) == state_number(*other)) == (one == other)


def test_numbers_are_those_that_results_were_made_with():
    assert [state_number(split, 5) for split in ("demonstration", "training", "evaluation")] == [15, 16, 17]
