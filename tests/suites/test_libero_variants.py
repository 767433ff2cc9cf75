"""Changes to LIBERO's problem files, without the simulator."""

import itertools

import numpy as np
import pytest

from perennial.randomness import stream
from perennial.suites._libero_variants import PERTURBED, RETAIN, Shift, _boxes, _starts, rewritten, shift

PROBLEM = """(define (problem LIBERO_Living_Room_Tabletop_Manipulation)
    (:regions
      (basket_init_region
          (:target living_room_table)
          (:ranges (
              (-0.01 0.25 0.01 0.27)
            )
          )
      )
      (soup_init_region
          (:target living_room_table)
          (:ranges (
              (0.025 -0.125 0.07500000000000001 -0.07500000000000001)
            )
          )
      )
      (contain_region
          (:target basket_1)
      )
    )
  (:objects
    alphabet_soup_1 - alphabet_soup
    basket_1 - basket
  )
  (:init
    (On alphabet_soup_1 living_room_table_soup_init_region)
    (On basket_1 living_room_table_basket_init_region)
  )
  (:goal
    (And (In alphabet_soup_1 basket_1_contain_region))
  )
)
"""


def box(problem, name):
    return np.array(_boxes(problem)[_starts(problem)[name]]["box"].split(), float)


def test_moving_a_thing_moves_the_corners_of_its_region_only():
    moved = rewritten(PROBLEM, Shift(moved={"alphabet_soup_1": (0.1, -0.02)}), stream(0))
    expected = [0.125, -0.145, 0.175, -0.095]
    np.testing.assert_allclose(box(moved, "alphabet_soup_1"), expected, atol=1e-6)
    np.testing.assert_array_equal(box(moved, "basket_1"), box(PROBLEM, "basket_1"))


def test_a_thing_without_a_region_cannot_be_moved():
    with pytest.raises(ValueError, match="milk_1"):
        rewritten(PROBLEM, Shift(moved={"milk_1": (0.1, 0.0)}), stream(0))


def test_the_living_room_becomes_a_kitchen_everywhere():
    changed = rewritten(PROBLEM, Shift(kitchen=True), stream(0))
    assert "iving_" not in changed
    assert "problem LIBERO_Kitchen_Tabletop_Manipulation" in changed
    assert changed.count("kitchen_table") == 4


@pytest.mark.parametrize("seed", range(20))
def test_distractors_keep_their_distance_and_are_new_to_the_scene(seed):
    changed = rewritten(PROBLEM, Shift(distractors=3), stream(seed))
    added = set(_starts(changed)) - set(_starts(PROBLEM))
    assert len(added) == 3
    for name in added:
        x0, y0, x1, y1 = box(changed, name)
        assert (x1 - x0, y1 - y0) == pytest.approx((0.002, 0.002), abs=2e-6)  # MuJoCo refuses a point
        assert max(-x0, x1) <= 0.3
        assert max(-y0, y1) <= 0.275
        assert f"{name} - {name.removesuffix('_1')}\n" in changed
    for one, other in itertools.combinations(_starts(changed), 2):
        if {one, other} & added:
            a, b = box(changed, one), box(changed, other)
            gap = np.maximum(0, np.maximum(a[:2] - b[2:], b[:2] - a[2:]))
            assert np.hypot(*gap) >= 0.15 - 1e-5
    assert changed == rewritten(PROBLEM, Shift(distractors=3), stream(seed))


def test_what_retain_published():
    """Offsets in metres and distractors, from the table of its settings."""
    stove, mugs, basket = RETAIN["long-2"], RETAIN["long-4"], RETAIN["long-7"]
    assert stove["hard-1"].moved == {"moka_pot_1": (0, -0.07), "flat_stove_1": (0.07, 0)}
    assert mugs["medium"].moved == {
        "white_yellow_mug_1": (0, -0.07),
        "porcelain_mug_1": (-0.05, 0),
        "plate_1": (0, 0.09),
        "plate_2": (-0.12, 0),
    }
    assert mugs["hard-0"].moved == mugs["medium"].moved | {"white_yellow_mug_1": (0.05, -0.09)}
    assert basket["hard-0"].moved["alphabet_soup_1"] == (-0.07, 0.05)
    assert [v.distractors for task in (stove, mugs, basket) for v in task.values()] == [0, 2, 2, 0, 3, 0, 0, 3, 3]
    assert [v.kitchen for task in (stove, mugs, basket) for v in task.values()] == [False] * 5 + [True] + [
        False,
        False,
        True,
    ]


def test_perturbations_keep_the_problem_file():
    assert not any(change.rewrites for change in PERTURBED.values())
    assert all(change.rewrites for changes in RETAIN.values() for change in changes.values())
    assert shift("long-7", "medium") is RETAIN["long-7"]["medium"]
    assert shift("long-7", "light") is PERTURBED["light"]
