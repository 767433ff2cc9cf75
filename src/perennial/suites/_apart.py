"""A thread and global random numbers of its own, for an environment whose code believes that it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Apart:
    """Calls functions as if nothing else ran in this process, one after another.

    They all run in one thread, because an OpenGL context belongs to the thread that made it current: gymnasium's MuJoCo
    renderer draws in whatever context its thread has, which would be that of the environment built last. And they find
    the global generators of `random` and NumPy as they left them, whatever others draw in between.
    """

    _numbers: tuple[Any, Any]

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.seed(0)

    def __call__(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """What `work` returns or raises, when it is done."""
        return self._thread.submit(self._with_own_numbers, partial(work, *args, **kwargs)).result()

    def _with_own_numbers(self, work: Callable[[], Result]) -> Result:
        others = random.getstate(), np.random.get_state()
        _continue(*self._numbers)
        try:
            return work()
        finally:
            self._numbers = random.getstate(), np.random.get_state()
            _continue(*others)

    def seed(self, number: int) -> None:
        """Let the next function begin with generators seeded with `number`, from 0 to 2^32 - 1."""
        self._numbers = random.Random(number).getstate(), np.random.RandomState(number).get_state()

    def close(self) -> None:
        """End the thread; nothing can be called afterwards."""
        self._thread.shutdown()


def _continue(python: Any, numpy: Any) -> None:
    """Let the global generators go on from these states."""
    random.setstate(python)
    np.random.set_state(numpy)
