from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from perennial.errors import PerennialError
from perennial.policies.base import ActionChunk
from perennial.rollout import collect
from perennial.rollout.collect import FILM_EVERY, Environments, play
from perennial.rollout.trajectory import Episode
from perennial.testing.toy import ToyEnvironment, ToyPolicy, ToySuite


class CountingEnvironment(ToyEnvironment):
    """Counts in `self.counts` what is asked of it."""

    def reset(self, *, seed=None, options=None):
        self.counts["reset"] += 1
        self.over = False
        return super().reset(seed=seed, options=options)

    def step(self, action):
        assert not self.over, "stepped after the end of the episode"
        self.counts["step"] += 1
        state, reward, terminated, truncated, info = super().step(action)
        self.over = terminated or truncated
        return state, reward, terminated, truncated, info

    def render(self):
        self.counts["render"] += 1
        return super().render()

    def close(self):
        self.counts["close"] += 1


class CountingSuite(ToySuite):
    def __init__(self):
        self.counts = Counter()

    def make(self, task, variant="id", image_size=8):
        self.counts["make"] += 1
        target = np.array(self.targets[task], np.float32)
        environment = CountingEnvironment(self.tasks[task], target, variant, image_size)
        environment.counts = self.counts
        return environment


class Straight(ToyPolicy):
    """Always full speed to the left, so that "left" is solved in few steps and "right" never."""

    def act(self, observation, temperature, rng):
        count = len(observation)
        actions = np.tile(np.array([-1.0, 0.0], np.float32), (count, 2, 1))
        return ActionChunk(actions, np.tile([0, 4, 0, 4], (count, 1)), np.zeros((count, 4), np.float32))


def request(index, task="left", **changes):
    episode = Episode(task, "id", "training", index % 5, f"go {task}", 1.0, ("test", task, index), index)
    return replace(episode, **changes)


REQUESTS = [request(i, "left" if i % 3 else "up-left") for i in range(14)]


def played(requests, slots=4, seed=0, policy=None):
    return play(policy or ToyPolicy(), Environments(ToySuite(), 8), requests, seed, slots)


def assert_equal(one, other):
    assert one.episode == other.episode
    assert one.success == other.success
    for name in ("images", "states", "samples", "log_probs", "steps", "frames"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_trajectories_come_back_in_the_order_of_the_requests():
    trajectories = played(REQUESTS)
    assert [t.episode for t in trajectories] == REQUESTS
    # They did not end in that order, or the test would show nothing.
    assert len({int(t.steps.sum()) for t in trajectories}) > 2
    for trajectory in trajectories:
        environment = ToySuite().make(trajectory.episode.task)
        start, _ = environment.reset(options={"split": "training", "index": trajectory.episode.initial_state})
        np.testing.assert_array_equal(trajectory.states[0], start)


def test_a_trajectory_replays_in_a_fresh_environment():
    for trajectory in played(REQUESTS[:6]):
        environment = ToySuite().make(trajectory.episode.task)
        state, info = environment.reset(options={"split": "training", "index": trajectory.episode.initial_state})
        for image, seen, sample, steps in zip(
            trajectory.images, trajectory.states, trajectory.samples, trajectory.steps, strict=True
        ):
            np.testing.assert_array_equal(image, environment.render())
            np.testing.assert_array_equal(seen, state)
            for action in ToyPolicy.centres[sample].reshape(2, 2)[:steps]:
                state, _, terminated, truncated, info = environment.step(action)
        assert terminated or truncated
        assert info["is_success"] == trajectory.success == terminated


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_how_many_play_side_by_side_changes_nothing_but_rounding(slots):
    for one, other in zip(played(REQUESTS, slots), played(REQUESTS, 4), strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.steps, other.steps)
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5)
        assert one.success == other.success


def test_the_same_requests_give_the_same_trajectories_and_another_seed_others():
    first, second, other = played(REQUESTS), played(REQUESTS), played(REQUESTS, seed=1)
    for one, again in zip(first, second, strict=True):
        assert_equal(one, again)
    assert any(not np.array_equal(one.samples[:1], third.samples[:1]) for one, third in zip(first, other, strict=True))


def test_an_episode_does_not_notice_its_neighbours():
    alone = played([REQUESTS[7]])[0]
    among = played(REQUESTS)[7]
    elsewhere = played([*REQUESTS[8:], REQUESTS[7]])[-1]
    for other in (among, elsewhere):
        np.testing.assert_array_equal(alone.samples, other.samples)
        np.testing.assert_array_equal(alone.states, other.states)
    # The stream is the key's: the same world under another key is played differently.
    renamed = played([replace(REQUESTS[7], key=("another",))])[0]
    assert not np.array_equal(renamed.samples[:1], alone.samples[:1])


def test_finished_episodes_stop_and_images_are_drawn_once_per_decision():
    suite = CountingSuite()
    requests = [request(i, "left" if i % 2 else "right") for i in range(9)]
    ended = []
    trajectories = play(
        Straight(), Environments(suite, 8), requests, 0, 4, lambda steps, success: ended.append((steps, success))
    )
    assert [t.success for t in trajectories] == [bool(i % 2) for i in range(9)]
    assert suite.counts["step"] == sum(int(t.steps.sum()) for t in trajectories)
    assert suite.counts["render"] == sum(len(t.steps) for t in trajectories)
    assert suite.counts["reset"] == 9
    assert all(t.steps.sum() == 10 for t in trajectories if not t.success)
    assert all(t.steps.sum() < 10 for t in trajectories if t.success)
    assert any(t.steps[-1] == 1 for t in trajectories), "no episode ended inside a chunk"
    assert sorted(ended) == sorted((int(t.steps.sum()), t.success) for t in trajectories)


def test_environments_are_reused_and_closed():
    suite = CountingSuite()
    environments = Environments(suite, 8)
    for _ in range(2):
        play(Straight(), environments, [request(i) for i in range(9)], 0, 4)
    assert suite.counts["make"] == 4
    environments.close()
    assert suite.counts["close"] == 4


def test_idle_environments_of_tasks_played_long_ago_are_closed(monkeypatch):
    monkeypatch.setattr(collect, "KEPT", 3)
    suite = CountingSuite()
    environments = Environments(suite, 8)
    for task in ("left", "right", "up", "down"):
        play(Straight(), environments, [request(0, task)], 0, 4)
    assert (suite.counts["make"], suite.counts["close"]) == (4, 1)
    play(Straight(), environments, [request(0, "down"), request(0, "up")], 0, 4)
    assert suite.counts["make"] == 4
    play(Straight(), environments, [request(0, "left")], 0, 4)
    assert (suite.counts["make"], suite.counts["close"]) == (5, 2)


def test_what_is_not_kept_is_not_brought_back():
    trajectories = played(REQUESTS)
    outcomes = played([replace(episode, keep=False) for episode in REQUESTS])
    for full, outcome in zip(trajectories, outcomes, strict=True):
        assert outcome.images.size == outcome.states.size == outcome.samples.size == outcome.log_probs.size == 0
        np.testing.assert_array_equal(outcome.steps, full.steps)
        assert outcome.success == full.success


def test_films_show_the_first_the_last_and_every_second_step():
    requests = [request(i, task, film=32, keep=False) for i in range(5) for task in ("left", "right")]
    trajectories = play(Straight(), Environments(ToySuite(), 8), requests, 0, 10)
    lengths = {int(trajectory.steps.sum()) for trajectory in trajectories}
    assert {length % FILM_EVERY for length in lengths} == {0, 1}
    for trajectory in trajectories:
        environment = ToySuite().make(trajectory.episode.task)
        environment.reset(options={"split": "training", "index": trajectory.episode.initial_state})
        frames = [environment.film(32)]
        for step in range(1, int(trajectory.steps.sum()) + 1):
            environment.step(np.array([-1.0, 0.0], np.float32))
            if step % FILM_EVERY == 0 or step == trajectory.steps.sum():
                frames.append(environment.film(32))
        np.testing.assert_array_equal(trajectory.frames, np.stack(frames))
        assert trajectory.frames.dtype == np.uint8
    assert played([request(0)])[0].frames.size == 0


def test_greedy_episodes_draw_nothing():
    greedy = [replace(episode, temperature=0.0) for episode in REQUESTS]
    for one, other in zip(played(greedy, seed=0), played(greedy, seed=1), strict=True):
        assert_equal(one, other)
        assert not one.log_probs.any()


class Wide(Straight):
    """Decides three numbers where the suite takes two."""

    def act(self, observation, temperature, rng):
        chunk = super().act(observation, temperature, rng)
        return replace(chunk, actions=np.pad(chunk.actions, ((0, 0), (0, 0), (0, 1))))


def test_actions_of_another_robot_are_refused():
    with pytest.raises(PerennialError, match="decides 3 numbers for an action, but the task 'left' takes 2;"):
        played(REQUESTS[1:2], policy=Wide())


def test_no_requests_give_no_trajectories():
    assert played([]) == []
