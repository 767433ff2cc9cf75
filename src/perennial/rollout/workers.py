"""Who plays the episodes: several processes (`ProcessWorkers`), this one (`InlineWorkers`), or the learner (`Learner`).

Every process worker has its own environments and its own copy of the policy whose parameters are views of one shared
memory buffer, so broadcasting new weights is one copy. Episodes are dealt out by position, never by arrival, so the
result does not depend on timing. A worker that dies or hangs is restarted and given the same episodes again.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from perennial import discovery, faults, machine
from perennial.errors import LearningError, PerennialError
from perennial.policies._placement import DType, load_policy
from perennial.policies.base import Policy
from perennial.policies.lora import Layout, bind, flatten
from perennial.rollout.collect import Environments, OnEpisode, play
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.suites.base import Suite

MEMORY_PER_WORKER = 1.5e9
"""Bytes that a worker with a small policy and a simulator takes at most."""
LONGEST_WAIT = 3600.0
"""Seconds to listen at one time, as the system refuses waits of weeks."""
BEAT = 1.0
"""Seconds after which a worker says again that it lives."""
ATTEMPTS = 3
"""How often the same episodes are given to a fresh worker before the run stops."""


@dataclass(frozen=True)
class WorkerConfig:
    """How episodes are played.

    Attributes:
        backend: "process" plays in worker processes, "inline" in this one, both with merged copies of the weights;
            "shared" in this one with the learner's own weights, its adapter beside them: no copy, and in bfloat16 the
            log-probabilities of acting are those that the learner sees.
        count: worker processes; 0 takes one per processor core, or fewer where memory is short.
        slots: episodes played side by side in each worker, which is the batch size of acting.
        timeout: seconds without a decision after which a worker process counts as hung; played in this process, a
            simulator that hangs or crashes stops the run.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"count"})
    backend: Literal["process", "inline", "shared"] = "process"
    count: int = 0
    slots: int = 16
    timeout: float = 300.0


@dataclass(frozen=True)
class Cast:
    """Who plays where: all a worker needs to build its own copy."""

    suite: str
    policy: str
    checkpoint: Path
    seed: int
    device: str = "cpu"
    dtype: DType | None = None


class Workers(Protocol):
    """Plays episodes with the weights that were broadcast last."""

    def broadcast(self, weights: Mapping[str, Tensor]) -> None:
        """Act with `weights`, by base parameter name, from now on."""
        ...

    def follow(self, policy: Policy) -> None:
        """Act as `policy` does now, until it learns again."""
        ...

    def collect(self, episodes: Sequence[Episode], on_episode: OnEpisode = ...) -> list[Trajectory]:
        """Play `episodes` and return their trajectories in the same order."""
        ...

    def close(self) -> None:
        """End the workers and release environments and memory."""
        ...


def sized(config: WorkerConfig) -> WorkerConfig:
    """`config` with the number of workers decided: one per core, as long as the free memory holds them."""
    affordable = int(machine.free_memory() / MEMORY_PER_WORKER)
    count = config.count or max(1, min(machine.cores(), affordable))
    return replace(config, count=count)


def start_workers(config: WorkerConfig, cast: Cast, weights: Mapping[str, Tensor]) -> Workers:
    """The workers that `config` asks for, acting with `weights`; where nobody learns, there is nothing to share."""
    backend = ProcessWorkers if config.backend == "process" else InlineWorkers
    return backend(config, cast, weights)


def start_beside(config: WorkerConfig, cast: Cast, policy: Policy) -> Workers:
    """The workers that `config` asks for, acting as `policy`, which learns in this process."""
    if config.backend == "shared":
        return Learner(config, cast, policy)
    return start_workers(config, cast, policy.acting_weights())


def _copy(cast: Cast) -> Policy:
    """A policy with the base weights."""
    return load_policy(cast.policy, cast.checkpoint, cast.device, cast.dtype)


def _environments(cast: Cast, policy: Policy) -> Environments:
    """An empty set of environments that draw what `policy` looks at."""
    return Environments(discovery.find("suites", cast.suite, Suite)(), policy.image_size)


class _Here:
    """Plays in the calling process."""

    def __init__(self, config: WorkerConfig, cast: Cast, policy: Policy) -> None:
        self._config, self._seed, self._policy = config, cast.seed, policy
        self._environments = _environments(cast, policy)

    def collect(
        self, episodes: Sequence[Episode], on_episode: OnEpisode = lambda steps, success: None
    ) -> list[Trajectory]:
        """See `Workers`."""
        return play(self._policy, self._environments, episodes, self._seed, self._config.slots, on_episode)

    def close(self) -> None:
        """See `Workers`."""
        self._environments.close()


class InlineWorkers(_Here):
    """Plays in the calling process with a policy of its own; for tests and debugging."""

    def __init__(self, config: WorkerConfig, cast: Cast, weights: Mapping[str, Tensor]) -> None:
        super().__init__(config, cast, _copy(cast))
        self.broadcast(weights)

    def broadcast(self, weights: Mapping[str, Tensor]) -> None:
        """See `Workers`."""
        self._policy.model.load_state_dict(dict(weights))

    def follow(self, policy: Policy) -> None:
        """See `Workers`."""
        self.broadcast(policy.acting_weights())


class Learner(_Here):
    """Plays in the calling process with the policy that learns."""

    def broadcast(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing that a run asks for.

        Raises:
            PerennialError: always.
        """
        raise PerennialError("Other weights than those that learn cannot act; set --workers.backend inline.")

    def follow(self, policy: Policy) -> None:
        """See `Workers`."""
        self._policy = policy


class _Worker:
    """One worker process, seen from the parent."""

    def __init__(self, start: Callable[[Connection], BaseProcess]) -> None:
        self._start = start
        self._restart()

    def _restart(self) -> None:
        self.connection, child = multiprocessing.Pipe()
        self.process = self._start(child)
        child.close()

    def play(self, positions: Sequence[int], episodes: Sequence[Episode]) -> None:
        """Give the worker its share."""
        self.positions, self.episodes, self.attempts = positions, episodes, 1
        self._send()

    def again(self, why: str) -> None:
        """Replace a worker that died or hung by a fresh one with the same share."""
        if self.attempts == ATTEMPTS:
            raise LearningError(
                f"A rollout worker {why} {ATTEMPTS} times on the same episodes of task "
                f"{self.episodes[0].task!r}; the run stops with its state committed. "
                "Check memory and the simulator with `perennial doctor`, then resume."
            )
        self.stop()
        self._restart()
        self.attempts += 1
        self._send()

    def _send(self) -> None:
        self.heard = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # a worker that is dead already is noticed by its silence
            self.connection.send(self.episodes)

    def stop(self) -> None:
        """End the process, waiting for it."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessWorkers:
    """Plays in `count` processes with one torch thread each."""

    def __init__(self, config: WorkerConfig, cast: Cast, weights: Mapping[str, Tensor]) -> None:
        self._config = config
        self._flat, layout = flatten(weights)
        self._flat.share_memory_()  # type: ignore[no-untyped-call]
        context = multiprocessing.get_context("spawn")

        def start(connection: Connection) -> BaseProcess:
            arguments = (connection, cast, config.slots, self._flat, layout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the parent's to answer
            process.start()
            signal.signal(signal.SIGINT, former)
            return process

        self._workers = [_Worker(start) for _ in range(sized(config).count)]

    def broadcast(self, weights: Mapping[str, Tensor]) -> None:
        """See `Workers`."""
        flatten(weights, out=self._flat)

    def follow(self, policy: Policy) -> None:
        """See `Workers`."""
        self.broadcast(policy.acting_weights())

    def collect(
        self, episodes: Sequence[Episode], on_episode: OnEpisode = lambda steps, success: None
    ) -> list[Trajectory]:
        """See `Workers`."""
        busy: list[_Worker] = []
        for number, worker in enumerate(self._workers):
            positions = range(number, len(episodes), len(self._workers))
            if positions:
                worker.play(positions, [episodes[i] for i in positions])
                busy.append(worker)
        trajectories: dict[int, Trajectory] = {}
        while busy:
            faults.point("rollout")
            patience = min(worker.heard for worker in busy) + self._config.timeout - time.monotonic()
            ready = wait([worker.connection for worker in busy], timeout=min(max(0.0, patience), LONGEST_WAIT))
            for worker in [worker for worker in busy if worker.connection in ready]:
                if self._receive(worker, trajectories, on_episode):
                    busy.remove(worker)
            for worker in busy:
                if time.monotonic() - worker.heard > self._config.timeout:
                    worker.again(f"decided nothing for {self._config.timeout:.0f} seconds")
        return [trajectories[i] for i in range(len(episodes))]

    def _receive(self, worker: _Worker, trajectories: dict[int, Trajectory], on_episode: OnEpisode) -> bool:
        """Take one message; True when the worker's share is complete."""
        worker.heard = time.monotonic()
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: killed in the middle of a message
            worker.process.join(5.0)  # the pipe closes a moment before the exit code is known
            worker.again(f"died (exit code {worker.process.exitcode})")
            return False
        if isinstance(message, PerennialError):
            raise message
        if isinstance(message, str):
            worker.again(f"failed ({message})")
            return False
        if isinstance(message, tuple):
            on_episode(*message)
        if message is None or isinstance(message, tuple):
            return False
        trajectories.update(zip(worker.positions, message, strict=True))
        return True

    def close(self) -> None:
        """See `Workers`."""
        for worker in self._workers:
            worker.stop()


def _serve(connection: Connection, cast: Cast, slots: int, flat: Tensor, layout: Layout) -> None:
    """The life of a worker process: play what is asked until the parent goes away."""
    torch.set_num_threads(1)
    policy = _copy(cast)
    environments = _environments(cast, policy)
    own = flat.to(policy.device)  # the shared buffer itself on the CPU
    bind(policy.model, own, layout)
    alive = _beat(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            episodes = connection.recv()
            if own is not flat:
                own.copy_(flat)
            try:
                trajectories = play(
                    policy, environments, episodes, cast.seed, slots, lambda *done: connection.send(done), alive
                )
            except PerennialError as error:
                connection.send(error)
                continue
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # a simulator may raise anything; the parent says what, and tries again
                connection.send(f"{type(error).__name__}: {error}")
                continue
            connection.send(trajectories)
    environments.close()


def _beat(connection: Connection) -> Callable[[], None]:
    """A function that tells the parent, now and then, that this process goes on."""
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last >= BEAT:
            connection.send(None)
            last = time.monotonic()

    return alive
