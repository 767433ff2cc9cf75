"""The toy suite in worlds that kill, stop or refuse; the folder `UNRELIABLE` remembers across processes.

Episodes with state 5, in training and demonstrations, misbehave at their second step in the way that the task is named.
"""

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from perennial.errors import PerennialError
from perennial.testing.toy import ToyEnvironment, ToySuite, _reach

BAD_STATE = 5


class UnreliableEnvironment(ToyEnvironment):
    def reset(self, *, seed=None, options=None):
        self.bad = options in [{"split": split, "index": BAD_STATE} for split in ("training", "demonstration")]
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        if self.bad and self.steps == 1:
            self.misbehave()
        return super().step(action)

    def misbehave(self) -> None:
        way, _, repeats = self.task.name.partition("-")
        seen = Path(os.environ["UNRELIABLE"]) / self.task.name
        try:  # of workers that come here at the same time, only one makes the file
            with seen.open("x" if repeats == "once" else "a") as file:
                file.write("x")
        except FileExistsError:
            return
        if way == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "hangs":
            time.sleep(3600)
        if way == "interrupts":
            os.killpg(0, signal.SIGINT)  # as Ctrl-C does: to the run and to its workers
        if way == "breaks":
            raise FileNotFoundError("no mesh called kettle.obj")
        if way == "refuses":
            raise PerennialError("The world is closed; try another one.")


class UnreliableSuite(ToySuite):
    name: ClassVar[str] = "unreliable"
    tasks: ClassVar = {
        name: _reach(name, "left")
        for name in (
            "dies-once",
            "dies-always",
            "hangs-once",
            "interrupts-once",
            "breaks-always",
            "refuses-always",
            "works",
        )
    }

    def make(self, task: str, variant: str = "id", image_size: int = 8) -> UnreliableEnvironment:
        return UnreliableEnvironment(self.tasks[task], np.array([-0.7, 0.0], np.float32), variant, image_size)
