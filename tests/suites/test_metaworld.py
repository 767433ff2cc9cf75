import subprocess
import sys

import numpy as np
import pytest

from perennial.doctor import Probe
from perennial.errors import PerennialError
from perennial.suites.metaworld import MetaWorld
from perennial.testing.suite_conformance import (
    CHECKS,
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
)

SUITE = MetaWorld()
SEEN_BY_EXPERTS = [*range(7), *range(11, 14), *range(18, 25), *range(29, 32), *range(36, 39)]
"""Entries of Meta-World's observation that are no orientations: hand, objects, the same a step before, goal."""


WHOLE_EPISODES = [
    "assembly-v3",
    "basketball-v3",
    "door-open-v3",
    "drawer-open-v3",
    "faucet-open-v3",
    "hammer-v3",
    "handle-press-v3",
    "lever-pull-v3",
    "pick-place-v3",
    "plate-slide-v3",
    "stick-push-v3",
    "window-close-v3",
]
"""Tasks that differ in what success is made of: grasp, contact, angle or distance."""


def plain(task, vector):
    """Meta-World's own environment of `task` with its own methods, reset to the random vector."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    environment = ALL_V3_ENVIRONMENTS[task]()
    environment._partially_observable = False
    environment.__dict__.pop("sawyer_observation_space", None)
    environment._set_task_called = True
    environment._last_rand_vec = vector
    return environment, environment.reset()[0]


def start(environment, index=0, split="training"):
    return environment.reset(options={"split": split, "index": index})


def test_reading_the_tasks_imports_no_simulator():
    code = (
        "import sys; from perennial.suites.metaworld import MetaWorld; s = MetaWorld(); "
        "assert len(s.tasks) == 50 and s.tasks['drawer-open-v3'].horizon == 120; "
        "assert not {'metaworld', 'mujoco'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_simulator_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.delitem(sys.modules, "perennial.suites._metaworld.simulation", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    import perennial.suites._metaworld

    monkeypatch.delattr(perennial.suites._metaworld, "simulation", raising=False)
    with pytest.raises(PerennialError, match=r"run pip install -c constraints\.txt -e '\.\[metaworld\]' in"):
        SUITE.make("drawer-open-v3")


@pytest.mark.parametrize("request_", [("drawer-open-v2", "id"), ("drawer-open-v3", "ood")])
def test_unknown_names_are_answered_with_the_nearest(request_):
    with pytest.raises(PerennialError, match="Did you mean"):
        SUITE.make(*request_)
    if request_[1] == "id":
        with pytest.raises(PerennialError, match="drawer-open-v3"):
            SUITE.expert(request_[0])


@pytest.mark.parametrize("task", SUITE.tasks)
def test_sentences_of_every_task(task):
    sentences_of_evaluation_are_never_trained(SUITE, task)
    sequences_name_tasks_once(SUITE, task)


@pytest.mark.parametrize("name", [None, "demo"])
def test_every_word_of_evaluation_is_trained_somewhere(name):
    tasks = (*SUITE.sequences[name].trained, *SUITE.sequences[name].held_out) if name else tuple(SUITE.tasks)
    trained = {word for task in tasks for sentence in SUITE.tasks[task].instructions for word in sentence.split()}
    assert not {word for task in tasks for word in SUITE.tasks[task].evaluation_instruction.split()} - trained


@pytest.mark.simulator
@pytest.mark.parametrize("task", ["drawer-open-v3", "push-v3"])
@pytest.mark.parametrize("check", CHECKS[2:], ids=lambda check: check.__name__)
def test_conformance(check, task):
    check(SUITE, task)


def assert_follows_meta_world(task, repetition, steps):
    """A disturbed expert episode equals that of Meta-World's own environment, bit for bit."""
    environment, expert = SUITE.make(task), SUITE.expert(task)
    start(environment, 5)  # what happened before leaves no trace
    environment.step(expert(environment))
    start(environment, repetition)
    simulation = environment._simulation
    reference, observed = plain(task, simulation._last_rand_vec)
    np.testing.assert_array_equal(environment.privileged()[SEEN_BY_EXPERTS], observed[SEEN_BY_EXPERTS])
    rng = np.random.default_rng(repetition)
    for _ in range(steps):
        action = np.clip(expert(environment) + rng.normal(0, 0.2, 4), -1, 1).astype(np.float32)
        _, _, terminated, truncated, info = environment.step(action)
        observed, _, _, _, expected = reference.step(action)
        np.testing.assert_array_equal(environment.privileged()[SEEN_BY_EXPERTS], observed[SEEN_BY_EXPERTS])
        np.testing.assert_array_equal(simulation.data.qpos, reference.data.qpos)
        assert info["is_success"] == bool(expected["success"])
        if terminated or truncated:
            break
    return info["is_success"]


@pytest.mark.simulator
@pytest.mark.parametrize("task", SUITE.tasks)
def test_every_task_starts_as_in_meta_world(task):
    assert_follows_meta_world(task, 0, 3)


@pytest.mark.simulator
@pytest.mark.parametrize("task", WHOLE_EPISODES)
def test_whole_episodes_are_those_of_meta_world(task):
    """The second episode from one state begins with the remembered settled hand."""
    assert [assert_follows_meta_world(task, 1, 500) for _ in range(2)] == [True, True]


@pytest.mark.simulator
def test_the_state_is_the_hand_and_its_opening():
    environment = SUITE.make("reach-v3")
    state, _ = start(environment)
    data = environment._simulation.data
    np.testing.assert_array_equal(state[:3], data.body("hand").xpos.astype(np.float32))
    assert state[3] > 0.9
    for _ in range(30):
        state, *_ = environment.step(np.array([0, 0, 0, 1], np.float32))
    assert state[3] < 0.5


@pytest.mark.simulator
@pytest.mark.parametrize("task", ["door-open-v3", "push-v3", "coffee-button-v3"])
def test_shifted_variants_start_farther_out(task):
    """Scaled to [-1, 1], initial states lie in the shells that the variants promise, and fill them."""
    shells = {}
    for variant in SUITE.variants:
        environment = SUITE.make(task, variant)
        space = environment._simulation._random_reset_space
        free = space.high - space.low > 0.01
        distances = []
        for index in range(40):
            start(environment, index)
            scaled = 2 * (environment._simulation._last_rand_vec - space.low)[free] / (space.high - space.low)[free] - 1
            distances.append(np.abs(scaled).max())
        shells[variant] = (min(distances), max(distances))
    expected = {"id": (0.0, 0.8), "narrow": (0.0, 0.3), "ood_val": (0.8, 0.9), "ood_test": (0.9, 1.0)}
    for variant, (inner, outer) in expected.items():
        nearest, farthest = shells[variant]
        assert inner <= nearest
        assert outer - 0.05 < farthest <= outer


@pytest.mark.simulator
def test_an_action_that_is_not_finite_is_refused():
    environment = SUITE.make("reach-v3")
    start(environment)
    with pytest.raises(PerennialError, match="not finite"):
        environment.step(np.array([0, np.nan, 0, 0], np.float32))


@pytest.mark.simulator
def test_an_unknown_split_is_refused():
    with pytest.raises(PerennialError, match="evaluation"):
        start(SUITE.make("reach-v3"), split="evaluate")


@pytest.mark.simulator
def test_the_picture_is_upright_and_the_film_shows_the_arm():
    """The drawer is in the lower half on the right of the hand; only the film shows the red arm above it."""
    environment = SUITE.make("drawer-open-v3", image_size=64)
    start(environment)
    image, film = environment.render()[0].astype(int), environment.film(64).astype(int)
    environment.close()
    assert (image[:16].sum(-1) == 0).mean() > 0.9, "above the table there is nothing"
    assert (image[40:].sum(-1) > 0).mean() > 0.5, "the table is below"

    def red(picture):
        return ((picture[..., 0] > 80) & (picture[..., 1:].max(-1) < 50)).sum()

    assert red(film[:32]) > 100
    assert red(image) < 20


@pytest.mark.simulator
@pytest.mark.parametrize("task", ["drawer-open-v3", "lever-pull-v3", "push-v3"])
def test_environments_share_a_model_but_not_the_places_of_things(task):
    """Three environments that are built, reset and stepped in turns play the episodes that each plays alone."""
    expert = SUITE.expert(task)

    def advance(environment):
        environment.step(expert(environment))
        return environment._simulation.data.qpos.copy()

    def alone(index):
        environment = SUITE.make(task)
        start(environment, index)
        return [advance(environment) for _ in range(6)]

    expected = [alone(index) for index in range(3)]
    environments = []
    for index in range(3):
        environments.append(SUITE.make(task))
        start(environments[index], index)
    together = [[advance(environment) for environment in environments] for _ in range(6)]
    assert len({id(environment._simulation.model) for environment in environments}) == 1
    np.testing.assert_array_equal(np.swapaxes(together, 0, 1), expected)


@pytest.mark.simulator
def test_a_model_that_was_dropped_is_compiled_anew():
    from perennial.suites._metaworld import simulation as metaworld_simulation

    one = SUITE.make("drawer-open-v3")
    start(one)
    metaworld_simulation.compiled.cache_clear()
    other = SUITE.make("drawer-open-v3")
    start(other)
    assert one._simulation.model is not other._simulation.model
    np.testing.assert_array_equal(one.render(), other.render())
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("installed", "result", "status"),
    [
        (None, Probe(False, "asked"), "warning"),
        ("3.1.1", Probe(False, "crashed with SIGSEGV"), "problem"),
        ("3.1.1", Probe(True, ""), "ok"),
    ],
)
def test_the_doctor_says_whether_it_can_be_imported(monkeypatch, installed, result, status):
    monkeypatch.setattr("perennial.doctor.installed_version", {"metaworld": installed}.get)
    monkeypatch.setattr("perennial.doctor.probe", {"import metaworld": result}.get)
    (check,) = SUITE.doctor()
    assert check.status == status
    assert result.said in check.finding or installed is None
    assert (check.fix == "") == (status == "ok")
