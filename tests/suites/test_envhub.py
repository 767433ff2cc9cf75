import itertools
import random
import sys
import types
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from perennial import config, discovery, experiment
from perennial.config import Evaluation, Tasks
from perennial.demonstrations.record import record
from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.reports.record import read
from perennial.rollout.workers import WorkerConfig
from perennial.suites._mujoco import choose_gl
from perennial.suites.base import Suite
from perennial.testing import hub
from perennial.testing.suite_conformance import CHECKS, IN_ANOTHER_PROCESS

NUMBERS = itertools.count()
NAME = "envhub:perennial.testing.hub:make_env"


def suite(name=NAME):
    return discovery.find("suites", name, Suite)()


@pytest.fixture
def made(monkeypatch):
    """Use the environments of this function as a suite."""

    def use(function):
        module = types.ModuleType(f"hub_{next(NUMBERS)}")
        module.make_env = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return suite(f"envhub:{module.__name__}:make_env")

    return use


class Changed(hub.Lift):
    """The example with something else about it."""

    def __init__(self, **changes):
        super().__init__("low")
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.mark.parametrize("task", ["lift-0", "lift-1"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, task):
    check(suite(), task)


class FromAnywhere(hub.Lift):
    """Begins and moves by the global generators, and pays no heed to its seed."""

    def reset(self, **settings):
        super().reset(seed=1)
        self._state[:3] += (np.random.uniform(-0.3, 0.3), random.uniform(-0.3, 0.3), np.random.uniform(-0.3, 0))
        return self._observation(), {}

    def step(self, action):
        return super().step(action * np.random.uniform(0.5, 1))


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check not in IN_ANOTHER_PROCESS], ids=lambda check: check.__name__
)
def test_an_environment_that_draws_from_global_generators_conforms_too(made, check):
    check(made(lambda n_envs, use_async_envs: FromAnywhere("low")), "hub-0")


def test_global_generators_go_on_for_others_as_if_there_were_no_environment(made):
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), *np.random.uniform(size=2)
    random.seed(5)
    np.random.seed(5)
    environment = made(lambda n_envs, use_async_envs: FromAnywhere("low")).make("hub-0")
    environment.reset()
    drawn = random.random(), np.random.uniform()
    environment.step(np.ones(4))
    assert (*drawn, np.random.uniform()) == expected


class Drawn(gymnasium.Wrapper):
    """One of gymnasium's own MuJoCo environments, whose renderer draws in whatever OpenGL context its thread has."""

    task_description = "reach"
    _max_episode_steps = 10

    def __init__(self, name):
        super().__init__(gymnasium.make(name, render_mode="rgb_array", width=48, height=48))
        picture = spaces.Box(0, 255, (48, 48, 3), np.uint8)
        self.observation_space = spaces.Dict({"pixels": picture, "agent_pos": self.env.observation_space})

    def reset(self, **settings):
        state, _ = self.env.reset(**settings)
        return {"pixels": self.render(), "agent_pos": state}, {}

    def step(self, action):
        state, *others = self.env.step(action)
        return {"pixels": self.render(), "agent_pos": state}, *others


def test_pictures_are_of_their_own_environment_while_others_are_made_drawn_and_closed(made):
    choose_gl()
    reacher, pusher = (
        made(lambda n_envs, use_async_envs, name=name: Drawn(name)) for name in ("Reacher-v5", "Pusher-v5")
    )
    first = reacher.make("hub-0", image_size=48)
    first.reset(seed=0)
    alone = first.render()
    assert alone.std() > 10, "something is drawn"
    second = pusher.make("hub-0", image_size=48)
    second.reset(seed=0)
    assert (second.render() != alone).mean() > 0.1
    for _ in range(2):
        first.reset(seed=0)
        np.testing.assert_array_equal(first.render(), alone)
        second.close()
    first.close()


def test_tasks_are_those_of_the_environments():
    found = suite()
    assert list(found.tasks) == ["lift-0", "lift-1"]
    assert found.sequences["all"].trained == ("lift-0", "lift-1")
    assert found.tasks["lift-1"].evaluation_instruction == "lift the point to the high mark"
    assert found.tasks["lift-1"].horizon == 20
    assert (found.state_dim, found.action_dim) == (4, 4)
    assert found.expert("lift-0") is None


def test_an_episode_is_that_of_the_environment_itself():
    """The same numbers as stepping it without the adapter, from the seed that stands for the initial state."""
    environment, own = suite().make("lift-1", image_size=48), hub.Lift("high")
    state, _ = environment.reset(options={"split": "evaluation", "index": 5})
    observed, _ = own.reset(seed=3 * 5 + 2)
    np.testing.assert_array_equal(state, observed["agent_pos"].astype(np.float32))
    ended = False
    while not ended:
        up = np.array([-state[0], 0.1, 0.5, 0], np.float32)
        state, reward, ended, truncated, info = environment.step(up)
        observed, _, terminated, _, expected = own.step(up)
        np.testing.assert_array_equal(state, observed["agent_pos"].astype(np.float32))
        assert (reward, ended, truncated) == (expected["is_success"], terminated, False)
        assert info == expected
    seen = environment.render()
    assert seen.shape == (1, 48, 48, 3)
    assert np.argwhere((seen[0] == 255).sum(-1) >= 2).mean(0)[0] < 20, "lifted above the middle"
    np.testing.assert_array_equal(environment.film(48), seen[0])


def test_cameras_are_in_the_order_of_the_space_and_may_differ_in_size(made):
    class Seen(hub.Lift):
        def _observation(self):
            views = {"wrist": np.full((9, 9, 3), 7, np.uint8), "front": np.full((20, 30, 3), 200, np.uint8)}
            return {"pixels": views, "agent_pos": self._state}

        def __init__(self):
            super().__init__("low")
            boxes = {
                name: spaces.Box(0, 255, view.shape, np.uint8) for name, view in self._observation()["pixels"].items()
            }
            self.observation_space = spaces.Dict(
                {"pixels": spaces.Dict(boxes), "agent_pos": spaces.Box(-1, 1, (4,), np.float64)}
            )

    environment = made(lambda n_envs, use_async_envs: Seen()).make("hub-0", image_size=16)
    environment.reset()
    np.testing.assert_array_equal(environment.render()[:, 3, 3], [[200] * 3, [7] * 3])
    np.testing.assert_array_equal(environment.film(5), np.full((5, 5, 3), 200))


def test_pictures_that_are_square_already_are_untouched(made):
    class Square(hub.Lift):
        def __init__(self):
            super().__init__("low")
            self.observation_space["pixels"] = spaces.Box(0, 255, (16, 16, 3), np.uint8)

        def _observation(self):
            picture = np.arange(16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
            return {"pixels": picture, "agent_pos": self._state}

    environment = made(lambda n_envs, use_async_envs: Square()).make("hub-0", image_size=16)
    environment.reset()
    np.testing.assert_array_equal(environment.render().ravel(), np.arange(16 * 16 * 3) % 256)


class Ending(hub.Lift):
    """Says `said` at its second step, which ends it as `terminated` says."""

    def __init__(self, said, terminated=True):
        super().__init__("low")
        self.said, self.ends, self.count = said, terminated, 0

    def reset(self, **settings):
        self.count = 0
        return super().reset(**settings)

    def step(self, action):
        self.count += 1
        observed, *_ = super().step(action)
        ended = self.count == 2
        return observed, 0.0, ended and self.ends, ended and not self.ends, self.said if ended else {}


@pytest.mark.parametrize(
    ("said", "terminated", "expected"),
    [
        ({"is_success": True}, True, (1, True, False)),
        ({"is_success": False}, True, (0, False, True)),
        ({"is_success": False}, False, (0, False, True)),
        ({"final_info": {"is_success": True}}, True, (1, True, False)),
        ({"final_info": {"is_success": np.False_}}, False, (0, False, True)),
    ],
)
@pytest.mark.parametrize("mode", list(gymnasium.vector.AutoresetMode)[:2])
def test_success_is_what_the_info_says(made, said, terminated, expected, mode):
    def make_env(n_envs, use_async_envs):
        return gymnasium.vector.SyncVectorEnv([lambda: Ending(said, terminated)], autoreset_mode=mode)

    environment = made(make_env).make("hub-0")
    for _ in range(2):
        environment.reset()
        assert environment.step(np.zeros(4))[1:4] == (0, False, False)
        _, *outcome, info = environment.step(np.zeros(4))
        assert tuple(outcome) == expected
        assert info == {"is_success": expected[1]}


def test_an_episode_that_says_nothing_of_success_is_an_error(made):
    environment = made(lambda n_envs, use_async_envs: Ending({})).make("hub-0")
    environment.reset()
    environment.step(np.zeros(4))
    with pytest.raises(PerennialError, match="without 'is_success'"):
        environment.step(np.zeros(4))


def test_actions_have_the_range_and_type_of_the_environment(made):
    class Wide(hub.Lift):
        def __init__(self):
            super().__init__("low")
            self.action_space = spaces.Box(np.array([-2, 0, -1, -1.0]), np.array([2, 3, 1, 1.0]), dtype=np.float64)

        def step(self, action):
            done.append(action.copy())
            return super().step(action)

    done = []
    environment = made(lambda n_envs, use_async_envs: Wide()).make("hub-0")
    environment.reset()
    environment.step(np.array([-9, 9, 0.5, 0], np.float32))
    np.testing.assert_array_equal(done, [[-2, 3, 0.5, 0]])
    assert done[0].dtype == np.float64
    assert environment.action_space.dtype == np.float32


def test_every_other_environment_is_closed(made):
    opened, closed = [], []

    class Counted(hub.Lift):
        def __init__(self, height):
            super().__init__(height)
            opened.append(self)

        def close(self):
            closed.append(self)

    def make_env(n_envs, use_async_envs):
        return {"a": {i: gymnasium.vector.SyncVectorEnv([lambda: Counted("low")]) for i in range(3)}}

    found = made(make_env)
    assert list(found.tasks) == ["a-0", "a-1", "a-2"]
    assert len(opened) == len(closed) == 3
    environment = found.make("a-1")
    assert (len(opened), len(closed)) == (6, 5)
    assert opened[4] not in closed
    environment.close()
    environment.close()
    assert len(set(map(id, closed))) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task_description": None, "observation_space": spaces.Discrete(2)}, "not pixels and agent_pos"),
        ({"observation_space": spaces.Dict({"pixels": spaces.Discrete(2)})}, "observes pixels, not"),
        ({"action_space": spaces.Discrete(3)}, r"The actions of hub-0 are Discrete\(3\)"),
        ({"action_space": spaces.Box(-np.inf, 1, (4,))}, "bounded"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(made, changes, sentence):
    with pytest.raises(PerennialError, match=sentence):
        _ = made(lambda n_envs, use_async_envs: Changed(**changes)).tasks


def test_an_environment_without_a_sentence_is_refused(made):
    class Mute(gymnasium.Env):
        observation_space = spaces.Discrete(2)
        action_space = spaces.Discrete(2)

    with pytest.raises(PerennialError, match="has no attribute 'task_description'"):
        _ = made(lambda n_envs, use_async_envs: Mute()).tasks


def test_environments_of_different_sizes_are_refused(made):
    def make_env(n_envs, use_async_envs):
        other = {"action_space": spaces.Box(-1, 1, (3,))}
        made = [lambda: Changed(), lambda: Changed(**other)]
        return {"a": {i: gymnasium.vector.SyncVectorEnv([one]) for i, one in enumerate(made)}}

    with pytest.raises(PerennialError, match="have 4 and 3, 4 and 4"):
        _ = made(make_env).state_dim


def test_more_copies_than_asked_for_are_refused(made):
    with pytest.raises(PerennialError, match="must be a VectorEnv of one"):
        _ = made(lambda n_envs, use_async_envs: hub.make_env(2)).tasks


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("envhub", "name one as --suite envhub:module:function"),
        ("envhub:perennial.testing.hub", "was given 'perennial.testing.hub'"),
        ("envhub:no_such_module:make_env", "No module named 'no_such_module'"),
        ("envhub:perennial.testing.hub:make_envs", "has no attribute 'make_envs'"),
        ("metaworld:perennial.testing.hub:make_env", "suite 'metaworld' takes nothing after a colon"),
    ],
)
def test_what_follows_the_colon_must_be_a_function(name, sentence):
    with pytest.raises(PerennialError, match=sentence):
        _ = suite(name).tasks


def test_what_is_asked_of_it_is_checked():
    with pytest.raises(PerennialError, match="lift-0"):
        suite().make("lift-9")
    with pytest.raises(PerennialError, match="Known: id"):
        suite().make("lift-0", "ood_val")
    environment = suite().make("lift-0")
    with pytest.raises(PerennialError, match="evaluation"):
        environment.reset(options={"split": "evaluate", "index": 0})
    environment.reset()
    with pytest.raises(PerennialError, match="not finite"):
        environment.step(np.full(4, np.nan))


def test_demonstrations_need_an_expert_and_there_is_none(tmp_path):
    with pytest.raises(PerennialError, match="has no scripted expert for lift-0"):
        record(suite(), "lift-0", range(1), tmp_path)


def test_the_small_policy_learns_and_is_evaluated_there(tmp_path):
    """One iteration of GRPO from the bundled checkpoint, whose state and actions have the same lengths."""
    preset = config.preset("demo")
    chosen = replace(
        preset,
        suite=NAME,
        tasks=Tasks(("lift-0",), ("lift-1",)),
        recipe=(GRPO(iterations=1, groups=4, group_size=4),),
        evaluation=Evaluation(episodes=2, film=0),
        workers=WorkerConfig("inline", count=1, slots=8),
    )
    run = read(experiment.start(config.validate(chosen), "demo", tmp_path / "run"))
    assert np.isfinite(run.matrices["id", "sampled"].rates()).all()
    assert [line["loss"] != 0 for line in run.iterations] == [True], "some episodes of a group succeeded, others failed"
