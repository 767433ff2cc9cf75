"""Changes to LIBERO's problem files, without the simulator."""

import importlib.util
import itertools

import numpy as np
import pytest
from libero_assets import libero, needs_libero, unpacked  # noqa: F401

from perennial.errors import PerennialError
from perennial.randomness import stream
from perennial.suites._libero import install as libero_install
from perennial.suites._libero.install import package
from perennial.suites._libero.tasks import location
from perennial.suites._libero.variants import (
    _DISTRACTORS,
    CAM2,
    PERTURBED,
    RETAIN,
    Shift,
    _boxes,
    _starts,
    rewritten,
    shift,
)

needs_problems = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="hf-libero is not installed")

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


def assert_apart(changed, added):
    """Distractors keep 15 cm from other regions along x or y, and 25 cm from those of a stove or a basket."""
    for one, other in itertools.combinations(_starts(changed), 2):
        if {one, other} & set(added):
            a, b = box(changed, one), box(changed, other)
            large = {one, other} & {"basket_1", "flat_stove_1"}
            gap = np.maximum(0, np.maximum(a[:2] - b[2:], b[:2] - a[2:]))
            assert gap.max() >= (0.25 if large else 0.15) - 1e-4, (one, other)


@pytest.mark.parametrize("seed", range(20))
def test_distractors_keep_their_distance_and_are_new_to_the_scene(seed):
    changed = rewritten(PROBLEM, Shift(distractors=3), stream(seed))
    added = set(_starts(changed)) - set(_starts(PROBLEM))
    assert len(added) == 3
    for name in added:
        x0, y0, x1, y1 = box(changed, name)
        assert (x1 - x0, y1 - y0) == pytest.approx((2e-5, 2e-5), abs=2e-6)
        assert max(-x0, x1) <= 0.3001
        assert max(-y0, y1) <= 0.2751
        assert f"{name} - {name.removesuffix('_1')}\n" in changed
    assert_apart(changed, added)
    assert changed == rewritten(PROBLEM, Shift(distractors=3), stream(seed))


def test_distractors_may_be_near_a_small_thing_but_not_near_a_basket():
    """Of 200 draws, the nearest to the soup is at less than 17 cm, the nearest to the basket at more than 25 cm."""
    nearest = {"alphabet_soup_1": 1.0, "basket_1": 1.0}
    for seed in range(200):
        changed = rewritten(PROBLEM, Shift(distractors=1), stream(seed))
        (added,) = set(_starts(changed)) - set(nearest)
        for name in nearest:
            a, b = box(changed, added), box(PROBLEM, name)
            nearest[name] = min(nearest[name], np.maximum(a[:2] - b[2:], b[:2] - a[2:]).max())
    assert 0.15 - 1e-4 < nearest["alphabet_soup_1"] < 0.17
    assert 0.25 - 1e-4 < nearest["basket_1"] < 0.27


def test_distractors_come_from_all_that_is_not_excluded():
    drawn = set()
    for seed in range(100):
        drawn |= set(_starts(rewritten(PROBLEM, Shift(distractors=3), stream(seed)))) - set(_starts(PROBLEM))
    assert drawn == {f"{kind}_1" for kind in _DISTRACTORS} - {"alphabet_soup_1"}


LARGE = {
    "basket",
    "basin_faucet",
    "chefmate_8_frypan",
    "desk_caddy",
    "dining_set_group",
    "faucet",
    "flat_stove",
    "microwave",
    "rack",
    "short_cabinet",
    "short_fridge",
    "slide_cabinet",
    "white_cabinet",
    "white_storage_box",
    "window",
    "wine_rack",
    "wooden_cabinet",
    "wooden_shelf",
    "wooden_tray",
    "wooden_two_layer_shelf",
}


@needs_libero
def test_what_retain_excludes_is_all_that_is_left_out(libero):  # noqa: F811
    """Of LIBERO's fifty kinds, twenty large ones and five others."""
    libero_install.prepare()
    from libero.libero.envs.objects import get_object_dict

    excluded = LARGE | {"cherries", "corn", "mayo", "salad_dressing", "target_zone"}
    assert set(_DISTRACTORS) == set(get_object_dict()) - excluded
    assert len(_DISTRACTORS) == len(set(_DISTRACTORS)) == 25


_MUGS = {"white_yellow_mug_1": (0, -0.07), "porcelain_mug_1": (-0.05, 0)}
PUBLISHED = {
    ("long-2", "medium"): ({"flat_stove_1": (0.07, 0)}, 0, False),
    ("long-2", "hard-0"): ({"flat_stove_1": (0.07, 0)}, 2, False),
    ("long-2", "hard-1"): ({"flat_stove_1": (0.07, 0), "moka_pot_1": (0, -0.07)}, 2, False),
    ("long-4", "medium"): (_MUGS, 0, False),
    ("long-4", "hard-0"): ({"white_yellow_mug_1": (0.05, -0.09), "porcelain_mug_1": (-0.05, 0)}, 3, False),
    ("long-4", "hard-1"): ({}, 0, True),
    ("long-7", "medium"): ({"cream_cheese_1": (-0.08, 0), "basket_1": (0.03, -0.06)}, 0, False),
    ("long-7", "hard-0"): (
        {"alphabet_soup_1": (-0.07, 0.05), "cream_cheese_1": (0.04, -0.1), "basket_1": (0, -0.06)},
        3,
        False,
    ),
    ("long-7", "hard-1"): ({}, 3, True),
}
"""Offsets in metres, number of distractors, and kitchen, from RETAIN's table of settings, without its plates."""


def test_what_retain_published():
    ours = {
        (task, variant): (dict(change.moved), change.distractors, change.kitchen)
        for task, variants in RETAIN.items()
        for variant, change in variants.items()
    }
    assert ours == PUBLISHED


@needs_problems
@pytest.mark.parametrize(("task", "variant"), PUBLISHED)
def test_problems_of_libero_are_changed_as_published_and_nowhere_else(task, variant):
    folder, file = location(task)
    problem = (package() / "bddl_files" / folder / f"{file}.bddl").read_text()
    moved, distractors, kitchen = PUBLISHED[task, variant]
    for seed in range(5):
        changed = rewritten(problem, shift(task, variant), stream(seed))
        before, after = _starts(problem), _starts(changed)
        added = set(after) - set(before)
        assert len(added) == distractors
        assert_apart(changed, added)
        for name, region in before.items():
            if region in _boxes(problem):
                offset = box(changed, name) - box(problem, name)
                np.testing.assert_allclose(offset, np.tile(moved.get(name, (0, 0)), 2), atol=1e-6)
        assert ("living_room" in changed.lower()) == ("living_room" in problem.lower() and not kitchen)
        assert changed[changed.index("(:goal") :] == problem[problem.index("(:goal") :]


def test_the_cameras_of_the_study():
    """Ten poses; the places of the first and the sixth in metres, and the eye points down at the table as LIBERO's."""
    assert set(CAM2) == {f"spatial-{place}" for place in range(10)}
    places = [shift(f"spatial-{place}", "cam2").view[0] for place in range(10)]
    assert places[0] == (0.63861317, 0.0, 1.61035002)
    assert places[5] == (0.6786, -0.06, 1.6304)
    assert len(set(places)) == 10
    for place, (_, turn) in enumerate(shift(f"spatial-{place}", "cam2").view for place in range(10)):
        assert turn == pytest.approx((0.63802, 0.30485, 0.30485, 0.63802), abs=0.0016), place
    assert not shift("spatial-3", "cam2").rewrites


def test_a_variant_that_is_not_the_tasks_is_refused_with_the_tasks_that_have_it():
    with pytest.raises(PerennialError, match=r"'cam2' is defined for spatial-0, .*, not for 'object-0'"):
        shift("object-0", "cam2")


def test_perturbations_keep_the_problem_file():
    assert not any(change.rewrites for change in PERTURBED.values())
    assert all(change.rewrites for changes in RETAIN.values() for change in changes.values())
    assert shift("long-7", "medium") is RETAIN["long-7"]["medium"]
    assert shift("long-7", "light") is PERTURBED["light"]
