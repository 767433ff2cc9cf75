"""What every suite must do, as small named checks; authors of suites run them on theirs.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(MySuite(), "my-task")

Each check makes and closes its own environments and raises AssertionError where one misbehaves. A suite passes for a
task if it passes all; `check_suite` runs them one after another.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar, get_args

import numpy as np
import psutil

from perennial.randomness import stream
from perennial.suites.base import Environment, Split, Suite

STEPS = 12
"""Length of the episodes of random actions that are compared."""
RESETS, REBUILDS = 200, 4
MOST = 10
"""Megabytes that a process may grow by in the meantime; MuJoCo's suites grow by 0 to 2."""

Answer = TypeVar("Answer")


def sentences_of_evaluation_are_never_trained(suite: Suite, task: str) -> None:
    """There are two training paraphrases at least, and no task is evaluated with a sentence that any task trains.

    Of a suite that shares sentences, every task is trained with its own sentence of evaluation.
    """
    ours = suite.tasks[task]
    assert ours.name == task
    if "sentences" in suite.shares:
        assert ours.evaluation_instruction in ours.instructions
    else:
        assert len(set(ours.instructions)) >= 2
        assert ours.evaluation_instruction not in ours.instructions
    for name, other in suite.tasks.items():
        if name != task:
            assert ours.evaluation_instruction not in other.instructions, name
            assert ours.evaluation_instruction != other.evaluation_instruction, name
            assert not set(ours.instructions) & set(other.instructions), name


def sequences_name_tasks_once(suite: Suite, task: str) -> None:
    """A sequence names tasks of the suite, and does not teach what it holds out."""
    for sequence in suite.sequences.values():
        named = (*sequence.trained, *sequence.held_out)
        assert set(named) <= set(suite.tasks)
        assert len(set(named)) == len(named)
        assert sequence.trained


def shapes_are_as_declared(suite: Suite, task: str) -> None:
    """States, images and films have the declared shapes and types."""
    with _environments(suite, task, image_size=32) as (environment, _):
        state, info = _reset(environment)
        assert environment.action_space.shape == (suite.action_dim,)
        for observed in (state, environment.step(_actions(environment)[0])[0]):
            assert observed.shape == (suite.state_dim,)
            assert observed.dtype == np.float32
        image = _image(environment)
        assert image.dtype == np.uint8
        assert image.shape == (len(image), 32, 32, 3)
        assert environment.film(48).shape == (48, 48, 3)
        assert info["is_success"] is False


def an_initial_state_is_always_the_same(suite: Suite, task: str) -> None:
    """Two environments show the same first image and, with the same actions, the same episode."""
    with _environments(suite, task) as (one, other):
        _assert_same(_episode(one), _episode(other))


def an_initial_state_is_the_same_in_another_process(suite: Suite, task: str) -> None:
    """Nothing that this process remembers or has drawn decides it."""
    _assert_same(_in_another_process(_first_episode, suite, task), _first_episode(suite, task))


def resets_forget_what_happened_before(suite: Suite, task: str) -> None:
    """An episode is the same after others have been played in the environment."""
    with _environments(suite, task) as (fresh, used):
        _episode(used, index=1)
        _episode(used, split="evaluation")
        _assert_same(_episode(fresh), _episode(used))


def environments_do_not_disturb_each_other(suite: Suite, task: str) -> None:
    """An episode is the same while another environment of the task plays a different one."""
    with _environments(suite, task) as (one, other):
        alone = _episode(one)
        _reset(one)
        _reset(other, index=1)
        for action in _actions(one)[: len(alone) - 1]:
            one.step(action)
            other.step(action / 2)
            other.render()
        np.testing.assert_array_equal(_image(one), alone[-1][1])


def splits_are_disjoint(suite: Suite, task: str) -> None:
    """All initial states of all splits look different, in every variant.

    Of a suite that shares states, those of training and evaluation are the same in the first variant.
    """
    for variant in suite.variants:
        seen: dict[str, list[bytes]] = {split: [] for split in get_args(Split)}
        with _environments(suite, task, variant, image_size=128) as (environment, _):
            for split, states in seen.items():
                for index in range(3):
                    state, _info = _reset(environment, split, index)
                    states.append(state.tobytes() + _image(environment).tobytes())
        if "states" in suite.shares and variant == suite.variants[0]:
            assert seen["training"] == seen["evaluation"]
        if "states" in suite.shares and seen["training"] == seen["evaluation"]:
            del seen["evaluation"]
        different = {state for states in seen.values() for state in states}
        assert len(different) == 3 * len(seen), variant


def finite_states_come_round(suite: Suite, task: str) -> None:
    """Where a suite says how many initial states there are, they differ and begin again after the last."""
    for variant in suite.variants:
        for split in get_args(Split):
            if (count := suite.states(task, split, variant)) is None:
                continue
            seen = {}
            with _environments(suite, task, variant) as (environment, _):
                for index in sorted({0, 1, count // 2, count - 1, count}):
                    state, _info = _reset(environment, split, index)
                    seen[index] = state.tobytes(), _image(environment).tobytes()
            assert seen.pop(count) == seen[0], (variant, split)
            assert len(set(seen.values())) == len(seen), (variant, split)


def variants_look_different(suite: Suite, task: str) -> None:
    """No two variants share the image of an initial state."""
    seen = set()
    for variant in suite.variants:
        with _environments(suite, task, variant) as (environment, _):
            _reset(environment)
            seen.add(_image(environment).tobytes())
    assert len(seen) == len(suite.variants)


def actions_are_kept_in_their_range(suite: Suite, task: str) -> None:
    """Actions outside the action space act like the nearest ones inside."""
    with _environments(suite, task) as (one, other):
        space: Any = one.action_space
        assert space.dtype == np.float32
        far = [(space.low + (space.high - space.low) * (3 * side - 1)).astype(np.float32) for side in (0, 1)]
        beyond = _episode(one, actions=far * 3)
        _assert_same(beyond, _episode(other, actions=[np.clip(action, space.low, space.high) for action in far * 3]))


def the_expert_succeeds(suite: Suite, task: str) -> None:
    """The expert, if there is one, solves most of five initial states; the episode ends when it has."""
    expert = suite.expert(task)
    if expert is None:
        return
    solved = 0
    with _environments(suite, task) as (environment, _):
        for index in range(5):
            _, info = _reset(environment, "demonstration", index)
            ended = truncated = False
            while not ended:
                assert not info["is_success"]
                action = expert(environment)
                assert environment.action_space.contains(action), action
                _, reward, terminated, truncated, info = environment.step(action)
                assert terminated == info["is_success"] == (reward == 1)
                ended = terminated or truncated
            solved += info["is_success"]
    assert solved >= 3, f"{solved} of 5"


def idle_episodes_are_truncated_at_the_horizon(suite: Suite, task: str) -> None:
    """Doing nothing does not solve the task, and the episode is truncated after `horizon` steps, not before."""
    with _environments(suite, task) as (environment, _):
        _reset(environment)
        idle = np.zeros(suite.action_dim, np.float32)
        ends = [environment.step(idle)[2:4] for _ in range(suite.tasks[task].horizon)]
        assert not any(terminated for terminated, _ in ends)
        assert [truncated for _, truncated in ends] == [False] * (len(ends) - 1) + [True]


def closing_leaves_others_alone(suite: Suite, task: str) -> None:
    """An environment may be closed twice, and the others of its task go on."""
    with _environments(suite, task) as (one, other):
        alone = _episode(other)
        _reset(one)
        one.render()
        one.close()
        one.close()
        _assert_same(_episode(other), alone)


def memory_is_given_back(suite: Suite, task: str) -> None:
    """Many resets with pictures do not let a process grow, nor do environments that were made and closed."""
    resets, rebuilds = _in_another_process(_growth, suite, task)
    assert resets < MOST, f"{RESETS} resets with pictures took {resets:.0f} MB"
    assert rebuilds < MOST, f"{REBUILDS} environments took {rebuilds:.0f} MB, though closed"


IN_ANOTHER_PROCESS: tuple[Callable[[Suite, str], None], ...] = (
    an_initial_state_is_the_same_in_another_process,
    memory_is_given_back,
)
"""Checks that pickle the suite and start a fresh process, in which nothing is patched."""

CHECKS: tuple[Callable[[Suite, str], None], ...] = (
    sentences_of_evaluation_are_never_trained,
    sequences_name_tasks_once,
    shapes_are_as_declared,
    an_initial_state_is_always_the_same,
    resets_forget_what_happened_before,
    environments_do_not_disturb_each_other,
    splits_are_disjoint,
    finite_states_come_round,
    variants_look_different,
    actions_are_kept_in_their_range,
    the_expert_succeeds,
    idle_episodes_are_truncated_at_the_horizon,
    closing_leaves_others_alone,
    *IN_ANOTHER_PROCESS,
)


def check_suite(suite: Suite, task: str) -> None:
    """Run all checks on one task."""
    for check in CHECKS:
        check(suite, task)


Seen = tuple[np.ndarray, np.ndarray, Any, bool]
"""State, images, reward and success."""


def _in_another_process(work: Callable[[Suite, str], Answer], suite: Suite, task: str) -> Answer:
    """What `work` answers in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, suite, task).result()


def _first_episode(suite: Suite, task: str) -> list[Seen]:
    with _environments(suite, task) as (environment, _):
        return _episode(environment)


def _growth(suite: Suite, task: str) -> tuple[float, float]:
    """Megabytes by which resets with pictures, and then making and closing environments, let this process grow."""
    environment = suite.make(task, suite.variants[0], 32)
    before = _look_around(environment, RESETS // 4)
    resets = _look_around(environment, RESETS) - before
    environment.close()
    sizes = []
    for _ in range(2 + REBUILDS):
        environment = suite.make(task, suite.variants[0], 32)
        _look_around(environment, 1)
        environment.close()
        sizes.append(_megabytes())
    return resets, sizes[-1] - sizes[1]


def _look_around(environment: Environment, resets: int) -> float:
    """Reset and draw so many times, and say how large the process is then."""
    splits = get_args(Split)
    for number in range(resets):
        _reset(environment, splits[number % len(splits)], number % 7)
        environment.render()
    return _megabytes()


def _megabytes() -> float:
    """What this process holds, without what has been freed but not yet given back to the system."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only the GNU C library has it
        trim(0)
    return float(psutil.Process().memory_info().rss / 2**20)


@contextmanager
def _environments(
    suite: Suite, task: str, variant: str | None = None, image_size: int = 32
) -> Iterator[tuple[Environment, Environment]]:
    """Two environments, closed at the end."""
    with ExitStack() as stack:
        made = [suite.make(task, variant or suite.variants[0], image_size) for _ in range(2)]
        for environment in made:
            stack.callback(environment.close)
        yield made[0], made[1]


def _reset(environment: Environment, split: str = "training", index: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    return environment.reset(options={"split": split, "index": index})


def _image(environment: Environment) -> np.ndarray:
    return np.asarray(environment.render())


def _actions(environment: Environment) -> list[np.ndarray]:
    space: Any = environment.action_space
    return list(stream(0, "conformance").uniform(space.low, space.high, (STEPS, *space.shape)).astype(np.float32))


def _episode(
    environment: Environment, split: str = "training", index: int = 0, actions: list[np.ndarray] | None = None
) -> list[Seen]:
    """What is seen in an episode of `actions`, random ones if None; it may end early."""
    state, info = _reset(environment, split, index)
    seen: list[Seen] = [(state, _image(environment), 0.0, info["is_success"])]
    for action in _actions(environment) if actions is None else actions:
        state, reward, terminated, truncated, info = environment.step(action)
        seen.append((state, _image(environment), reward, info["is_success"]))
        if terminated or truncated:
            break
    return seen


def _assert_same(one: list[Seen], other: list[Seen]) -> None:
    assert len(one) == len(other)
    for (state, image, *outcome), (other_state, other_image, *other_outcome) in zip(one, other, strict=True):
        np.testing.assert_array_equal(state, other_state)
        np.testing.assert_array_equal(image, other_image)
        assert outcome == other_outcome
