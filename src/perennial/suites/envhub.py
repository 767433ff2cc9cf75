"""Environments made for LeRobot, from its hub of environments or from its own code, used as they are.

Choose it as `--suite envhub:module:function`. The function takes `n_envs` and `use_async_envs` and returns what
LeRobot's `make_env` does: `{suite: {task_id: VectorEnv}}`, or a `VectorEnv`, or a `gymnasium.Env`. It is called again
for every environment, with one copy each and in this process; the tasks `suite-task_id` are read from a first call.
Nothing is downloaded unless the function does it.

An environment must offer what LeRobot's evaluation asks of it: observations with "pixels" (a picture or several by
camera) and "agent_pos"; `task_description`; `_max_episode_steps`; and `is_success` in its info. Its sentence is that of
evaluation; training says please. Initial state n of a split is what `reset(seed=...)`, and NumPy's and Python's global
generators with the same seed, make of a number that no other has. An environment that draws from elsewhere is no suite;
`perennial.testing.suite_conformance` tells.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch.nn.functional import interpolate

from perennial import discovery
from perennial.errors import PerennialError, unknown
from perennial.suites import base
from perennial.suites._apart import Apart


@dataclass(frozen=True)
class _Description:
    """What is read from the environments once."""

    tasks: Mapping[str, base.Task]
    state_dim: int
    action_dim: int


class EnvHub(base.Suite):
    """Environments made for LeRobot.

    Attributes:
        argument: `module:function`, what follows the colon in the name of the suite.
    """

    name: ClassVar[str] = "envhub"
    argument: ClassVar[str] = ""

    def __reduce__(self) -> tuple[Callable[[str], EnvHub], tuple[str]]:
        """For other processes: the class that has the argument is in no module, so it is made again from the name."""
        return _named, (self.argument,)

    @property
    def tasks(self) -> Mapping[str, base.Task]:  # type: ignore[override]
        """By name; the environments are built to read them."""
        return _described(self.argument).tasks

    @property
    def sequences(self) -> Mapping[str, base.Sequence]:  # type: ignore[override]
        """One: all tasks in the order in which the function returns them."""
        return {"all": base.Sequence(trained=tuple(self.tasks), held_out=())}

    @property
    def state_dim(self) -> int:  # type: ignore[override]
        """Length of "agent_pos"."""
        return _described(self.argument).state_dim

    @property
    def action_dim(self) -> int:  # type: ignore[override]
        """Length of an action."""
        return _described(self.argument).action_dim

    def make(self, task: str, variant: str = "id", image_size: int = 64) -> HubEnvironment:
        """Build the environment of `task`; see `Suite.make`."""
        if task not in self.tasks:
            raise unknown(f"task of {self.argument}", task, self.tasks)
        if variant not in self.variants:
            raise unknown("variant", variant, self.variants)
        apart = Apart()
        return HubEnvironment(self.tasks[task], apart, apart(_chosen, self.argument, task), image_size)


def _named(argument: str) -> EnvHub:
    """The suite `envhub:argument`."""
    return discovery.find("suites", f"envhub:{argument}", EnvHub)()


def _chosen(argument: str, task: str) -> Any:
    """The `VectorEnv` of `task`; the others are closed."""
    wanted = None
    for name, vector in _built(argument):
        if name == task:
            wanted = vector
        else:
            vector.close()
    if wanted is None:
        raise PerennialError(f"{argument} has returned {task!r} only once; it must always make the same tasks.")
    return wanted


@functools.cache
def _described(argument: str) -> _Description:
    """The tasks and sizes of what the function makes, read apart from other environments."""
    apart = Apart()
    try:
        return apart(_read, argument)
    finally:
        apart.close()


def _read(argument: str) -> _Description:
    """The tasks and sizes of what the function makes.

    Raises:
        PerennialError: an environment lacks something, or they differ in their sizes.
    """
    tasks, sizes = {}, set()
    for name, vector in _built(argument):
        try:
            told, horizon = _attribute(vector, "task_description", name), _attribute(vector, "_max_episode_steps", name)
            tasks[name] = base.Task(name, (f"please {told}", f"{told} please"), str(told), int(horizon))
            sizes.add(_sizes(vector, name))
        finally:
            vector.close()
    if len(sizes) != 1:
        found = ", ".join(f"{state} and {action}" for state, action in sorted(sizes)) or "none"
        raise PerennialError(
            f"The environments of {argument} must share the lengths of state and action, but have {found}; "
            "make a function for those of each length."
        )
    return _Description(tasks, *sizes.pop())


def _built(argument: str) -> Iterator[tuple[str, Any]]:
    """Name and `VectorEnv` of everything that the function makes, one copy each; who iterates closes them."""
    made = _function(argument)(n_envs=1, use_async_envs=False)
    if isinstance(made, gymnasium.Env):
        single = made
        made = gymnasium.vector.SyncVectorEnv([lambda: single])
    suites = made if isinstance(made, Mapping) else {"hub": {0: made}}
    for suite, vectors in suites.items():
        for number, vector in vectors.items():
            if getattr(vector, "num_envs", None) != 1:
                raise PerennialError(
                    f"{argument} has made {vector!r} for {suite}-{number}; with n_envs=1 it must be a VectorEnv of one."
                )
            yield f"{suite}-{number}", vector


def _function(argument: str) -> Callable[..., Any]:
    """What `argument` names."""
    module, _, name = argument.partition(":")
    if not module or not name:
        raise PerennialError(
            f"The suite envhub needs a function that makes environments, but was given {argument!r}; "
            "name one as --suite envhub:module:function."
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PerennialError(
            f"{argument} cannot be imported ({error}); put its folder into PYTHONPATH and install what it needs."
        ) from error
    made: Callable[..., Any] = function
    return made


def _attribute(vector: Any, attribute: str, task: str) -> Any:
    """An attribute of the one environment in `vector`, or of `vector` itself."""
    with suppress(AttributeError):
        return vector.call(attribute)[0]
    if not hasattr(vector, attribute):
        raise PerennialError(f"The environment {task} has no attribute {attribute!r}; add it, as LeRobot needs it too.")
    return getattr(vector, attribute)


def _sizes(vector: Any, task: str) -> tuple[int, int]:
    """Lengths of state and action."""
    observed, action = vector.single_observation_space, vector.single_action_space
    keys = set(observed) if isinstance(observed, gymnasium.spaces.Dict) else set()
    if not {"pixels", "agent_pos"} <= keys:
        raise PerennialError(
            f"The environment {task} observes {', '.join(sorted(keys)) or observed}, not pixels and agent_pos; "
            "ask it for both, in LeRobot by obs_type='pixels_agent_pos'."
        )
    if not isinstance(action, gymnasium.spaces.Box) or len(action.shape) != 1 or not action.is_bounded():
        raise PerennialError(f"The actions of {task} are {action}, but must be a vector of bounded numbers; wrap it.")
    return observed["agent_pos"].shape[0], action.shape[0]


class HubEnvironment(base.Environment):
    """One task of a vector environment of size one; see `suites.base.Environment`.

    The proprioceptive state is "agent_pos", actions are the environment's own, pictures are squeezed into squares. An
    episode terminates at success, and is truncated when the environment ends it otherwise or after its
    `_max_episode_steps`. Without options, `reset(seed=n)` goes to training state n.
    """

    def __init__(self, task: base.Task, apart: Apart, vector: Any, image_size: int) -> None:
        space = vector.single_action_space
        self.task = task
        self.action_space = gymnasium.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))
        self.observation_space = vector.single_observation_space["agent_pos"]
        self._dtype = space.dtype
        self._apart = apart
        self._vector = vector
        self._image_size = image_size
        self._observed: Mapping[str, Any] = {}
        self._steps = 0
        self._closed = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; see `suites.base.Environment`.

        Raises:
            PerennialError: unknown split.
        """
        super().reset(seed=seed)
        number = base.state_number(*base.initial_state(seed, options))
        self._apart.seed(number)
        self._observed, _ = self._apart(self._vector.reset, seed=number)
        self._steps = 0
        return self._state(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move for one control step; the reward is 1 at success, else 0.

        Raises:
            PerennialError: the action is not finite, or the episode has ended without a word on success.
        """
        base.require_finite(action)
        space: Any = self.action_space
        clipped = np.clip(action, space.low, space.high).astype(self._dtype)
        self._observed, _, terminated, truncated, info = self._apart(self._vector.step, clipped[None])
        self._steps += 1
        told = _success(info)
        ended = bool(terminated[0] or truncated[0]) or self._steps >= self.task.horizon
        if ended and told is None:
            raise PerennialError(
                f"An episode of {self.task.name} has ended without 'is_success' in its info; add it to the environment."
            )
        success = bool(told)
        return self._state(), float(success), success, ended and not success, {"is_success": success}

    def _state(self) -> np.ndarray:
        state: np.ndarray = np.array(self._observed["agent_pos"][0], np.float32)
        return state

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The pictures of the last observation, uint8 [cameras, image_size, image_size, 3]."""
        return np.stack([_square(picture, self._image_size) for picture in self._pictures()])

    def film(self, size: int) -> np.ndarray:
        """The picture of the first camera, uint8 [size, size, 3]."""
        return _square(self._pictures()[0], size)

    def _pictures(self) -> list[np.ndarray]:
        pixels = self._observed["pixels"]
        return [camera[0] for camera in pixels.values()] if isinstance(pixels, Mapping) else [pixels[0]]

    def close(self) -> None:
        """Close the environment; it may be closed already."""
        if not self._closed:
            self._closed = True
            self._apart(self._vector.close)
            self._apart.close()


def _success(info: Mapping[str, Any]) -> bool | None:
    """What a vector environment says about success, None if nothing.

    What it says of the episode that has ended comes first: the rest may be of the next one, begun in the same step.
    """
    final = info.get("final_info")
    told = _success(final) if isinstance(final, Mapping) else None
    if told is None and "is_success" in info:
        return bool(np.asarray(info["is_success"]).reshape(-1)[0])
    return told


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture, uint8 [H, W, 3], as a square of `size` pixels; untouched if it is one."""
    if picture.shape[:2] == (size, size):
        return picture.copy()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    resized = interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    made: np.ndarray = resized.round()[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
    return made
