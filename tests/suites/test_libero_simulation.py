"""LIBERO's scenes that are dropped and built again."""

import gc
import weakref

import numpy as np
import pytest
from libero_assets import libero, needs_libero, unpacked  # noqa: F401

from perennial.suites.libero import Libero

pytestmark = needs_libero


@pytest.fixture
def simulation(libero, monkeypatch):  # noqa: F811
    """The module of the simulation, with room for one scene and nothing remembered."""
    Libero().make("object-5").close()  # chooses how to draw, before anything imports MuJoCo
    from perennial.suites import _libero_simulation

    monkeypatch.setattr(_libero_simulation, "_SCENES", 1)
    monkeypatch.setattr(_libero_simulation, "_scenes", {})
    monkeypatch.setattr(_libero_simulation, "_settled", {})
    return _libero_simulation


def episode(environment, steps=5):
    """The simulator's positions after a reset and after each of `steps` random actions; the episode does not end."""
    environment.reset(options={"split": "training", "index": 3})
    seen = [environment.simulation._data.qpos.copy()]
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, 7)).astype(np.float32):
        environment.step(action)
        seen.append(environment.simulation._data.qpos.copy())
    environment.simulation.end()
    return seen


def test_an_episode_is_the_same_in_a_scene_that_was_built_again(simulation):
    """From a remembered beginning, whose controller looked at the simulation that has been dropped."""
    first, second = (Libero().make(task) for task in ("object-5", "object-0"))
    fresh = episode(first)
    dropped = simulation._scenes["object-5", "id", "", 0]
    episode(second)
    np.testing.assert_array_equal(episode(first), fresh)
    assert first.simulation.present() is not dropped
    for environment in (first, second):
        environment.close()


def test_what_is_remembered_of_a_dropped_scene_keeps_no_simulation_alive(simulation):
    """Neither the remembered beginnings nor an environment that has not been closed hold on to it."""
    first, second = (Libero().make(task) for task in ("object-5", "object-0"))
    episode(first)
    gone = [weakref.ref(simulation._scenes["object-5", "id", "", 0].sim)]
    gone.append(weakref.ref(first.simulation._data))
    episode(second)
    gc.collect()
    assert simulation._settled
    assert [reference() for reference in gone] == [None, None]
    for environment in (first, second):
        environment.close()
