from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libero_assets import libero, needs_libero, unpacked  # noqa: F401
from scipy.spatial.transform import Rotation

from perennial.suites._libero.expert import (
    _GAIN,
    Progress,
    Thing,
    _bump,
    _decide,
    _drawer,
    _grasp,
    _measure,
    _tilt,
    _towards,
)
from perennial.suites._mujoco import choose_gl
from perennial.suites.libero import Libero

SUITE = Libero()


def thing(x, y, bottom, breadth, height):
    place = np.array([x, y, bottom + height / 2])
    half = np.array([breadth, breadth, height]) / 2
    return Thing(place, place - half, place + half)


BOWL = thing(-0.1, 0.1, 0.9, 0.11, 0.05)
TIN = thing(0.1, -0.15, 0.9, 0.06, 0.1)
PLATE = thing(0.05, 0.2, 0.9, 0.18, 0.02)
BASKET = thing(0.0, 0.25, 0.9, 0.2, 0.14)
BLOCK = thing(-0.1, 0.1, 0.9, 0.2, 0.2)
ON_BLOCK = thing(-0.1, 0.1, 1.1, 0.11, 0.05)
DRAWER = replace(thing(-0.15, 0.05, 0.85, 0.3, 0.11), yaw=2.7)


@dataclass
class Table:
    """A hand that moves by at most 2 cm a step, as LIBERO's does, and an item that follows it while it is held."""

    item: Thing
    goal: Thing
    furniture: list[Thing] = field(default_factory=list)
    hand: np.ndarray = field(default_factory=lambda: np.array([-0.2, 0.0, 1.2]))
    closed: int = 0
    held: bool = False
    released: bool = False
    lowest: list[tuple[float, float]] = field(default_factory=list)

    def step(self, progress):
        move, grip = _decide(progress, self.hand, self.item, self.goal, [self.goal, *self.furniture])
        step = 0.02 * np.clip(_GAIN * move, -1, 1)
        self.closed = max(0, min(6, self.closed + (1 if grip > 0 else -1)))
        inside = np.all(self.hand > self.item.low - 0.02) and np.all(self.hand < self.item.high + 0.02)
        self.released = self.held and self.closed == 0
        self.held = self.closed > 0 and (self.held or (self.closed == 6 and bool(inside)))
        self.hand = self.hand + step
        if self.held:
            self.move(step)
            self.lowest.append((float(np.linalg.norm((self.item.place - self.goal.place)[:2])), self.item.low[2]))

    def move(self, step):
        self.item = Thing(self.item.place + step, self.item.low + step, self.item.high + step)

    def play(self, progress, until=lambda table: table.released):
        """Steps until something has happened; whether it has within an episode."""
        for _ in range(220):
            self.step(progress)
            if until(self):
                return True
        return False


@pytest.mark.parametrize(
    ("item", "goal", "furniture", "height"),
    [
        (BOWL, PLATE, [], PLATE.high[2]),
        (TIN, BASKET, [], BASKET.high[2]),
        (ON_BLOCK, PLATE, [BLOCK], BLOCK.high[2]),
        (BOWL, PLATE, [DRAWER], DRAWER.high[2]),
    ],
    ids=["bowl on a plate", "tin in a basket", "bowl from furniture", "bowl in a drawer"],
)
def test_it_carries_the_item_over_what_is_in_the_way_and_lets_go_at_the_goal(item, goal, furniture, height):
    """By the time the item has covered half of the way, its underside is higher than the highest thing there."""
    table = Table(item, goal, furniture)
    assert table.play(Progress())
    np.testing.assert_allclose(table.item.place[:2], goal.place[:2], atol=0.015)
    half = np.linalg.norm((item.place - goal.place)[:2]) / 2
    crossing = [low for distance, low in table.lowest if half * 0.8 < distance < half * 1.2]
    assert crossing
    assert min(crossing) > height
    if goal is PLATE:
        assert table.item.low[2] == pytest.approx(PLATE.high[2], abs=0.015)
    else:
        assert table.hand[2] < BASKET.high[2]


def test_an_item_lost_on_the_way_is_fetched_again():
    table, progress = Table(BOWL, PLATE), Progress()
    assert table.play(progress, lambda table: table.held and table.item.low[2] > 0.95)
    table.held, table.closed = False, 0
    table.move(np.array([-0.1, -0.1, BOWL.low[2] - table.item.low[2]]))
    table.step(progress)
    assert progress.phase == "reach"
    assert table.play(progress)
    np.testing.assert_allclose(table.item.place[:2], PLATE.place[:2], atol=0.015)


def test_an_item_that_slips_at_the_grasp_is_tried_again():
    table, progress = Table(BOWL, PLATE), Progress()
    assert table.play(progress, lambda table: progress.phase == "close")
    table.move(np.array([0.08, 0.05, 0.0]))
    assert table.play(progress)
    np.testing.assert_allclose(table.item.place[:2], PLATE.place[:2], atol=0.015)


def test_an_item_that_rolls_away_from_the_goal_is_fetched_again():
    table, progress = Table(BOWL, PLATE), Progress()
    assert table.play(progress)
    table.move(np.array([-0.2, -0.2, BOWL.low[2] - table.item.low[2]]))
    assert table.play(progress)
    np.testing.assert_allclose(table.item.place[:2], PLATE.place[:2], atol=0.015)


def test_an_item_that_rests_on_the_goal_before_it_is_quite_there_is_let_go():
    """As a tilted bowl does that touches a plate with its rim; the hand pushes on but stands still."""
    table, progress = Table(BOWL, PLATE), Progress()
    table.play(progress, lambda table: np.linalg.norm((table.item.place - PLATE.place)[:2]) < 0.03)
    held = table.hand
    while progress.phase == "carry" and progress.steps < 100:
        _decide(progress, held, table.item, PLATE, [PLATE])
    assert progress.phase == "open"


def test_a_hand_that_is_turned_for_a_drawer_stays_so_until_it_has_let_go():
    """Although the bowl is out of the drawer by then."""
    table, progress, turns = Table(BOWL, PLATE, [DRAWER]), Progress(), []

    def released(table):
        turns.append(progress.turn)
        return table.released

    assert table.play(progress, released)
    assert max(low for _, low in table.lowest) > DRAWER.high[2]
    np.testing.assert_allclose(turns, 2.7 - np.pi / 2)
    while progress.phase != "reach":
        table.step(progress)
    table.step(progress)
    assert progress.turn == 0


@pytest.mark.parametrize(
    ("item", "other", "expected"),
    [
        (BOWL, DRAWER, True),
        (BOWL, thing(-0.1, 0.1, 0.85, 0.3, 0.09), True),
        (BOWL, thing(-0.1, 0.1, 0.85, 0.3, 0.08), False),
        (BOWL, thing(0.1, 0.1, 0.85, 0.3, 0.11), False),
        (BOWL, thing(-0.1, -0.1, 0.85, 0.3, 0.11), False),
        (ON_BLOCK, BLOCK, False),
    ],
    ids=["in a drawer", "in one 1 cm lower", "in a tray", "beside a drawer", "behind a drawer", "on furniture"],
)
def test_a_drawer_is_what_the_item_is_in_and_reaches_about_to_its_rim(item, other, expected):
    """The rim may be 12 mm higher, as that of a bowl is which leans on the drawer."""
    assert _drawer(item, [PLATE, other]) is (other if expected else None)


def test_what_sticks_to_the_item_does_not_lift_it_without_end():
    """A dish that is held with the bowl rises with it, and would always be in the way."""

    class Sticky(Table):
        def move(self, step):
            super().move(step)
            self.furniture = [Thing(t.place + step, t.low + step, t.high + step) for t in self.furniture]

    table = Sticky(BOWL, PLATE, [thing(BOWL.place[0], BOWL.place[1] + 0.02, 0.9, 0.09, 0.06)])
    assert table.play(Progress())
    assert max(low for _, low in table.lowest) < BOWL.low[2] + 0.06 + 2 * 0.04
    np.testing.assert_allclose(table.item.place[:2], PLATE.place[:2], atol=0.015)


@settings(max_examples=30)
@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(0.0, 0.4))
def test_the_hand_comes_down_only_in_a_funnel_above_its_place(x, y, z):
    """It never is lower over `place` than four times what is missing sideways, and ends exactly there."""
    hand, place = np.array([x, y, z]), np.zeros(3)
    for _ in range(80):
        move = 0.02 * np.clip(_GAIN * _towards(hand, place, 0.2, hand), -1, 1)
        hand = hand + move
        if z > 0.2:
            assert hand[2] > min(0.2, 4 * (np.linalg.norm(hand[:2]) - 0.006)) - 0.03
    np.testing.assert_allclose(hand, place, atol=1e-6)


def test_the_hand_rises_over_where_it_started_before_it_goes_sideways():
    start = np.array([0.1, 0.0, 0.0])
    move = _towards(np.array([0.11, 0.0, 0.0]), np.array([0.4, 0.0, 0.0]), 0.3, start)
    np.testing.assert_allclose(move, [-0.01, 0.0, 0.3])


def test_a_bump_is_the_area_that_is_shared_with_the_broad_part_of_the_hand():
    """The hand is 7 by 22 cm there; things lower than 2.5 cm above its fingers do not count."""
    hand = np.array([0.0, 0.0, 1.0])
    other = Thing(np.zeros(3), np.array([0.015, 0.09, 0.9]), np.array([0.5, 0.5, 1.1]))
    assert _bump(hand, other) == pytest.approx(0.02 * 0.02)
    assert _bump(hand, replace(other, high=np.array([0.5, 0.5, 1.02]))) == 0
    assert _bump(hand, replace(other, low=np.array([0.5, 0.09, 0.9]), high=np.array([0.6, 0.5, 1.1]))) == 0


@pytest.mark.parametrize("side", [-1, 1])
def test_a_bowl_is_taken_by_the_wall_that_is_away_from_its_neighbour(side):
    wall = thing(BOWL.place[0], BOWL.place[1] + side * 0.16, 0.9, 0.1, 0.3)
    taken, turn = _grasp(BOWL, [wall])
    assert turn == 0
    assert (taken[1] - BOWL.place[1]) * side < 0
    assert abs(taken[1] - BOWL.place[1]) < (BOWL.high[1] - BOWL.low[1]) / 2
    assert BOWL.low[2] < taken[2] < BOWL.high[2]


def test_a_narrow_thing_is_taken_in_its_middle_unless_something_is_in_the_way():
    long = Thing(np.zeros(3), np.array([-0.08, -0.03, 0.0]), np.array([0.08, 0.03, 0.1]))
    np.testing.assert_allclose(_grasp(long, [])[0][:2], 0)
    taken, _ = _grasp(long, [thing(0.05, 0.0, 0.0, 0.06, 0.3)])
    assert -0.08 < taken[0] < 0


@pytest.mark.parametrize("aside", [-0.02, 0.02])
@pytest.mark.parametrize("yaw", [-3.0, -1.8, -0.5, 0.0, 0.7, 2.7])
def test_in_a_drawer_the_fingers_take_the_inner_wall_side_by_side_along_its_front(yaw, aside):
    front = np.array([np.cos(yaw), np.sin(yaw), 0])
    drawer = replace(DRAWER, place=BOWL.place - aside * front + 0.1 * np.array([-front[1], front[0], 0]), yaw=yaw)
    taken, turn = _grasp(BOWL, [PLATE, drawer])
    fingers = Rotation.from_rotvec([0, 0, turn]).apply([0, 1, 0])
    np.testing.assert_allclose(np.cross(fingers, front), 0, atol=1e-9)
    assert -np.pi / 4 <= turn < 3 * np.pi / 4
    offset = taken - BOWL.place
    assert offset @ front == pytest.approx(-np.sign(aside) * 0.046)
    np.testing.assert_allclose(np.cross(offset, front)[2], 0, atol=1e-9)


def test_a_narrow_thing_in_a_drawer_is_taken_as_anywhere():
    drawer = thing(0.1, -0.15, 0.85, 0.3, 0.2)
    taken, turn = _grasp(TIN, [drawer])
    np.testing.assert_allclose(taken[:2], TIN.place[:2])
    assert turn == 0


@pytest.mark.parametrize("turn", [0.0, 1.1])
def test_the_hand_comes_to_point_down_with_its_fingers_turned_from_y(turn):
    now = Rotation.from_euler("xyz", [3.0, 0.2, 0.1])
    body = SimpleNamespace(xquat=np.roll(now.as_quat(), 1))
    scene = SimpleNamespace(robot=SimpleNamespace(robot_model=SimpleNamespace(eef_name="hand")))
    missing = _tilt(SimpleNamespace(body={"hand": body}.get), scene, turn)
    reached = (Rotation.from_rotvec(missing) * now).as_matrix()
    np.testing.assert_allclose(reached[:, 1], [np.sin(turn), -np.cos(turn), 0], atol=1e-9)
    np.testing.assert_allclose(reached[:, 2], [0, 0, -1], atol=1e-9)


def test_bounds_are_those_of_the_turned_boxes_that_can_be_touched():
    choose_gl()  # for the tests of this process that draw: importing MuJoCo settles how
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody><body name="a" pos="1 2 3" euler="0 0 45">
        <geom type="box" size=".1 .1 .2"/>
        <body><geom type="sphere" size=".05" pos="0 0 .3"/></body>
        <geom type="box" size="9 9 9" contype="0" conaffinity="0"/>
        </body><geom type="box" size="5 5 5"/></worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    scene = SimpleNamespace(
        model=model,
        sim=SimpleNamespace(data=SimpleNamespace(_data=data)),
        env=SimpleNamespace(obj_body_id={"a": model.body("a").id}),
    )
    found = _measure(scene, "a")
    wide = 0.1 * np.sqrt(2)
    np.testing.assert_allclose(found.low, [1 - wide, 2 - wide, 2.8])
    np.testing.assert_allclose(found.high, [1 + wide, 2 + wide, 3.35])
    np.testing.assert_allclose(found.place, [1, 2, 3])
    assert found.yaw == pytest.approx(np.pi / 4)


@needs_libero
@pytest.mark.parametrize("task", ["object-2", "spatial-4", "spatial-5"])
def test_it_solves_tasks_from_demonstration_states(libero, task):  # noqa: F811
    """Two environments in turn, so the memory of one episode must not leak into the other."""
    expert, environments = SUITE.expert(task), [SUITE.make(task), SUITE.make(task)]
    for index, environment in enumerate(environments):
        environment.reset(options={"split": "demonstration", "index": index})
    solved = [False, False]
    for _ in range(SUITE.tasks[task].horizon):
        for index, environment in enumerate(environments):
            if not solved[index]:
                solved[index] = environment.step(expert(environment))[4]["is_success"]
        if all(solved):
            break
    for environment in environments:
        environment.close()
    assert solved == [True, True]


def test_all_tasks_of_spatial_and_object_have_an_expert_and_no_others():
    served = {task for task in SUITE.tasks if SUITE.expert(task) is not None}
    assert served == {f"{suite}-{place}" for suite in ("spatial", "object") for place in range(10)}
