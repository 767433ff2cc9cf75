"""The toy suite with as few initial states as benchmarks that store them: four for training, three for evaluation."""

from typing import Any

import numpy as np

from perennial.suites.base import Split
from perennial.testing import toy

STATES = {"training": 4, "evaluation": 3}


class FiniteEnvironment(toy.ToyEnvironment):
    """Begins in state `index` modulo the number of states."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        split, index = (options["split"], options["index"]) if options else ("training", 0)
        return super().reset(options={"split": split, "index": index % STATES.get(split, index + 1)})


class FiniteSuite(toy.ToySuite):
    """Its demonstrations begin in ever new states."""

    name = "finite"

    def states(self, task: str, split: Split, variant: str = "id") -> int | None:
        return STATES.get(split)

    def make(self, task: str, variant: str = "id", image_size: int = 8) -> toy.ToyEnvironment:
        target = np.array(self.targets[task], np.float32)
        return FiniteEnvironment(self.tasks[task], target, variant, image_size)
