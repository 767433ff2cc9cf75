"""The words of a suite: task, split, variant, environment, expert."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

import gymnasium
import numpy as np

from perennial.errors import PerennialError, how_to_install, unknown

Split = Literal["demonstration", "training", "evaluation"]
"""Initial states of different splits never coincide, unless a suite follows a paper that shares them and says so."""
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Task:
    """One skill.

    Attributes:
        name: unique within the suite.
        instructions: paraphrases used for demonstrations and training.
        evaluation_instruction: a paraphrase that is never trained on, unless a paper that the suite follows has one.
        horizon: environment steps after which an episode is truncated.
    """

    name: str
    instructions: tuple[str, ...]
    evaluation_instruction: str
    horizon: int


@dataclass(frozen=True)
class Sequence:
    """An order in which tasks are taught, and tasks that are only ever evaluated."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


class Environment(gymnasium.Env[np.ndarray, np.ndarray]):
    """One simulated robot with one task, a `gymnasium.Env` with three agreements.

    - `reset(options={"split": Split, "index": int})` puts it into that initial state, always the same one.
    - `reset` and `step` return the proprioceptive state, float32 [state_dim]; the camera images, uint8 [V, H, W, 3],
      come from `render()` and are drawn only when it is called.
    - `info["is_success"]` is a bool; the episode terminates when it becomes True and is truncated at the horizon.

    Actions are float32 [action_dim] in the range of `action_space`.
    """

    def film(self, size: int) -> np.ndarray:
        """A picture for people, uint8 [size, size, 3], in the renderer's full quality."""
        raise NotImplementedError


def initial_state(seed: int | None, options: Mapping[str, Any] | None) -> tuple[Split, int]:
    """Split and index of the initial state that `reset` is asked for; without options, training state `seed`.

    Raises:
        PerennialError: unknown split.
    """
    wanted = {"split": "training", "index": seed or 0, **(options or {})}
    if wanted["split"] not in SPLITS:
        raise unknown("split", str(wanted["split"]), SPLITS)
    return wanted["split"], int(wanted["index"])


def state_number(split: Split, index: int) -> int:
    """A number for an initial state, for simulators that want a seed; no other state has the same one."""
    return len(SPLITS) * index + SPLITS.index(split)


def require_finite(action: np.ndarray) -> None:
    """See that `action` can be executed.

    Raises:
        PerennialError: a number of it is infinite or NaN.
    """
    if not np.isfinite(action).all():
        raise PerennialError(f"The action {action} is not finite; look for NaN in the policy's weights.")


class Expert(Protocol):
    """A scripted policy with privileged access to the environment."""

    def __call__(self, environment: Environment) -> np.ndarray:
        """The expert's action in the environment's present state, float32 [action_dim]."""
        ...


class Suite(ABC):
    """An ordered list of tasks in one simulator. Importing it or reading its tasks imports no simulator.

    Attributes:
        tasks: by name.
        sequences: named task orders.
        variants: names of shifted versions of every task; the first is the in-distribution one and is called "id".
        shares: what training shares with evaluation because a published protocol does: "states" of the first variant,
            "sentences". Empty is the rule.
        state_dim: length S of the proprioceptive state.
        action_dim: length D of an action.
        steps_per_second: environment steps of one process, without pictures, as far as measured; for plans only.
    """

    name: ClassVar[str]
    tasks: Mapping[str, Task]
    sequences: Mapping[str, Sequence]
    variants: tuple[str, ...] = ("id",)
    shares: frozenset[Literal["states", "sentences"]] = frozenset()
    state_dim: int
    action_dim: int
    steps_per_second: float = 100.0

    @abstractmethod
    def make(self, task: str, variant: str = "id", image_size: int = 64) -> Environment:
        """Build the environment of `task`; the caller closes it.

        Raises:
            PerennialError: unknown task or variant, or the simulator is not installed.
        """

    def check(self, task: str, variant: str = "id") -> None:
        """See that the environment of `task` can be built, as far as that is known without a simulator.

        Raises:
            PerennialError: it cannot.
        """
        return

    def require_simulator(self) -> None:
        """See that the simulator is here with what it needs, without importing it; asked before a run begins.

        Raises:
            PerennialError: it is not; says how to get it.
        """
        return

    def states(self, task: str, split: Split, variant: str = "id") -> int | None:
        """How many initial states there are if they are finite: then index n is state n modulo this number."""
        return None

    def fewest_states(self, tasks: Iterable[str], split: Split, variant: str = "id") -> int | None:
        """The least number of initial states that one of `tasks` has, None if none of them has finitely many.

        Who plays more of each begins from some state again, which is no new evidence.
        """
        counts = (self.states(task, split, variant) for task in tasks)
        return min((count for count in counts if count is not None), default=None)

    def expert(self, task: str) -> Expert | None:
        """The scripted expert of `task`, if there is one."""
        return None

    def doctor(self) -> list[Any]:
        """Checks of this suite's simulator for `perennial doctor`."""
        return []


def package_folder(package: str, what: str, how: str) -> Path:
    """The folder of the simulator `what`, found without importing it.

    Raises:
        PerennialError: it is not installed; says `how` to get it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise PerennialError(f"{what} is not installed; {how}.")
    return Path(next(iter(found.submodule_search_locations)))


def require_package(package: str, what: str, extra: str) -> None:
    """See that the simulator `what`, a package that comes with `extra`, can be found; it is not imported.

    Raises:
        PerennialError: it cannot.
    """
    package_folder(package, what, f"run {how_to_install(extra)}")


def require_known(suite: Suite, called: str, tasks: Iterable[str] = (), variants: Iterable[str] = ()) -> None:
    """See that `suite`, chosen as `called`, has these tasks and variants.

    Raises:
        PerennialError: it does not; the nearest names are listed.
    """
    for task in tasks:
        if task not in suite.tasks:
            raise unknown(f"task in suite {called!r}", task, suite.tasks)
    for variant in variants:
        if variant not in suite.variants:
            raise unknown(f"variant in suite {called!r}", variant, suite.variants)
