"""Plays episodes: the policy looks once per chunk, every environment in the batch then acts on its own.

Episodes fill a fixed number of slots in order; a slot whose episode ends takes the next one. Finished episodes cost
nothing, images are drawn only when the policy looks, and which episodes share a batch depends on nothing but the
requests, so the same requests always give the same trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from perennial.errors import PerennialError
from perennial.policies.base import ActionChunk, Observation, Policy
from perennial.randomness import stream
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.suites.base import Environment, Suite

FILM_EVERY = 2
"""Environment steps between two frames of a film."""

KEPT = 64
"""Idle environments that a process keeps."""

OnEpisode = Callable[[int, bool], None]
"""Called with the environment steps and the success of every finished episode."""


class Environments:
    """Environments by task and variant, built when first needed and reused for later episodes.

    At most `KEPT` idle ones are kept, those of the tasks played last, as they hold simulator models and renderers.
    """

    def __init__(self, suite: Suite, image_size: int) -> None:
        self._suite = suite
        self._image_size = image_size
        self._idle: list[tuple[str, str, Environment]] = []

    def borrow(self, task: str, variant: str) -> Environment:
        """An environment that nobody uses at present."""
        for position, (of_task, of_variant, environment) in enumerate(self._idle):
            if (of_task, of_variant) == (task, variant):
                del self._idle[position]
                return environment
        return self._suite.make(task, variant, self._image_size)

    def give_back(self, task: str, variant: str, environment: Environment) -> None:
        """Return what was borrowed."""
        self._idle.append((task, variant, environment))
        if len(self._idle) > KEPT:
            self._idle.pop(0)[2].close()

    def close(self) -> None:
        """Close every idle environment."""
        while self._idle:
            self._idle.pop()[2].close()


@dataclass
class _Slot:
    """An episode being played."""

    index: int
    episode: Episode
    environment: Environment
    rng: np.random.Generator
    state: np.ndarray
    images: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    success: bool = False
    done: bool = False


def play(
    policy: Policy,
    environments: Environments,
    episodes: Sequence[Episode],
    seed: int,
    slots: int,
    on_episode: OnEpisode = lambda steps, success: None,
    on_decision: Callable[[], None] = lambda: None,
) -> list[Trajectory]:
    """Play `episodes`, at most `slots` at a time, and return their trajectories in the same order.

    All episodes must share one temperature. `seed` is the run's seed, which names the random streams. `on_decision` is
    called after every chunk that all slots have carried out.
    """
    trajectories: list[Trajectory | None] = [None] * len(episodes)
    waiting = iter(enumerate(episodes))
    active = list(_next_slots(waiting, slots, environments, seed))
    while active:
        chunk = policy.act(_observe(active), episodes[0].temperature, [slot.rng for slot in active])
        for row, slot in enumerate(active):
            _execute(slot, chunk, row)
        on_decision()
        for slot in [slot for slot in active if slot.done]:
            trajectories[slot.index] = _finish(slot)
            environments.give_back(slot.episode.task, slot.episode.variant, slot.environment)
            on_episode(sum(slot.steps), slot.success)
        active = [slot for slot in active if not slot.done]
        active.extend(_next_slots(waiting, slots - len(active), environments, seed))
    return [trajectory for trajectory in trajectories if trajectory is not None]


def _next_slots(
    waiting: Iterator[tuple[int, Episode]], count: int, environments: Environments, seed: int
) -> Iterator[_Slot]:
    """Start up to `count` waiting episodes."""
    for _ in range(count):
        index, episode = next(waiting, (-1, None))
        if episode is None:
            return
        environment = environments.borrow(episode.task, episode.variant)
        state, _ = environment.reset(options={"split": episode.split, "index": episode.initial_state})
        slot = _Slot(index, episode, environment, stream(seed, *episode.key), state)
        if episode.film:
            slot.frames.append(environment.film(episode.film))
        yield slot


def _observe(active: Sequence[_Slot]) -> Observation:
    """What the policy sees of all active episodes."""
    for slot in active:
        slot.images.append(np.asarray(slot.environment.render()))
        slot.states.append(slot.state)
    return Observation(
        np.stack([slot.images[-1] for slot in active]),
        tuple(slot.episode.instruction for slot in active),
        np.stack([slot.states[-1] for slot in active]),
    )


def _execute(slot: _Slot, chunk: ActionChunk, row: int) -> None:
    """Carry out one chunk open loop, until its end or the end of the episode."""
    executed = 0
    said, wanted = chunk.actions.shape[2:], slot.environment.action_space.shape
    if said != wanted:
        raise PerennialError(
            f"The policy decides {said[0]} numbers for an action, but the task {slot.episode.task!r} takes "
            f"{wanted and wanted[0]}; choose a checkpoint that was trained on this suite."
        )
    for action in chunk.actions[row]:
        slot.state, _, terminated, truncated, info = slot.environment.step(action)
        executed += 1
        slot.success = bool(info["is_success"])
        slot.done = terminated or truncated
        if slot.episode.film and (slot.done or (sum(slot.steps) + executed) % FILM_EVERY == 0):
            slot.frames.append(slot.environment.film(slot.episode.film))
        if slot.done:
            break
    slot.steps.append(executed)
    slot.samples.append(chunk.sample[row])
    slot.log_probs.append(chunk.log_prob[row])
    if not slot.episode.keep:
        slot.images.clear()
        slot.states.clear()
        slot.samples.clear()
        slot.log_probs.clear()


def _finish(slot: _Slot) -> Trajectory:
    """The trajectory of an episode that has ended."""

    def stacked(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values) if values else np.zeros(0, np.float32)

    return Trajectory(
        episode=slot.episode,
        images=stacked(slot.images),
        states=stacked(slot.states),
        samples=stacked(slot.samples),
        log_probs=stacked(slot.log_probs),
        steps=np.asarray(slot.steps, np.int32),
        success=slot.success,
        frames=np.stack(slot.frames) if slot.frames else np.zeros((0, 0, 0, 3), np.uint8),
    )
