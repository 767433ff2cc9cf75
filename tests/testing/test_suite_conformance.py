"""The toy suite conforms, and broken ones are found out."""

import os
from typing import ClassVar

import numpy as np
import pytest

from perennial.suites.base import Task
from perennial.testing import suite_conformance
from perennial.testing.suite_conformance import CHECKS, memory_is_given_back, splits_are_disjoint
from perennial.testing.toy import ToyEnvironment, ToySuite

KEPT = []


class Broken(ToySuite):
    """Its environments are of another class."""

    environment = ToyEnvironment

    def make(self, task, variant="id", image_size=8):
        made = super().make(task, variant, image_size)
        made.__class__ = self.environment
        return made


class KeepsPictures(Broken):
    class environment(ToyEnvironment):  # noqa: N801
        def render(self):
            KEPT.append(np.ones(2**17, np.uint8))
            return super().render()


class KeepsEnvironments(Broken):
    class environment(ToyEnvironment):  # noqa: N801
        def close(self):
            KEPT.append(np.ones(2**23, np.uint8))


class Forgetful(Broken):
    """An initial state depends on the process."""

    class environment(ToyEnvironment):  # noqa: N801
        def reset(self, *, seed=None, options=None):
            super().reset(options=options)
            self.position += np.float32(os.getpid() % 1000 * 1e-5)
            return self.position.copy(), {"is_success": False}


class Shared(Broken):
    """Training states are those of evaluation."""

    class environment(ToyEnvironment):  # noqa: N801
        def reset(self, *, seed=None, options=None):
            split = "training" if options["split"] == "evaluation" else options["split"]
            return super().reset(options=options | {"split": split})


class Declared(Shared):
    shares = frozenset({"states"})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_toy_conforms(check):
    check(ToySuite(), "left")


def test_pictures_that_are_kept_are_found():
    with pytest.raises(AssertionError, match=r"200 resets with pictures took 2. MB"):
        memory_is_given_back(KeepsPictures(), "left")


def test_environments_that_closing_does_not_free_are_found():
    with pytest.raises(AssertionError, match=r"4 environments took 3. MB, though closed"):
        memory_is_given_back(KeepsEnvironments(), "left")


def test_initial_states_that_depend_on_the_process_are_found():
    with pytest.raises(AssertionError):
        suite_conformance.an_initial_state_is_the_same_in_another_process(Forgetful(), "left")


def test_shared_states_must_be_declared_and_be_shared():
    with pytest.raises(AssertionError):
        splits_are_disjoint(Shared(), "left")
    splits_are_disjoint(Declared(), "left")
    undone = type("Undone", (ToySuite,), {"shares": Declared.shares})
    with pytest.raises(AssertionError):
        splits_are_disjoint(undone(), "left")


def test_shared_sentences_must_be_declared_and_be_shared():
    class Told(ToySuite):
        tasks: ClassVar = {name: Task(name, (name,), name, 20) for name in ToySuite.targets}

    check = suite_conformance.sentences_of_evaluation_are_never_trained
    with pytest.raises(AssertionError):
        check(Told(), "left")
    Told.shares = frozenset({"sentences"})
    check(Told(), "left")
    Told.tasks = ToySuite.tasks
    with pytest.raises(AssertionError):
        check(Told(), "left")
