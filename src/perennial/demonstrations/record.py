"""Records episodes of scripted experts; what is recorded already is left as it is, so recording can be repeated."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from safetensors.numpy import save

from perennial import discovery
from perennial.demonstrations.dataset import HEADER, data_hash, read
from perennial.errors import PerennialError
from perennial.randomness import stream
from perennial.storage.atomic import MANIFEST, sha256, write_bytes, write_json
from perennial.suites.base import Environment, Expert, Suite, Task

_JOB = 25
"""Episodes that one process records before it takes the next job."""
TIMEOUT = 600.0
"""Seconds after which an episode counts as hanging, where processes of their own record."""


@dataclass(frozen=True)
class Settings:
    """How demonstrations are recorded.

    Attributes:
        variant: of the task.
        image_size: side of the images in pixels.
        image_every: environment steps from one image to the next.
        noise: standard deviation of the Gaussian noise on the executed actions of every second episode; 1 is half the
            range of an action's number. The recorded actions are the expert's own, so the learner sees how to recover
            (Laskey et al. 2017, arXiv 1703.09327).
    """

    variant: str = "id"
    image_size: int = 64
    image_every: int = 4
    noise: float = 0.25


def record(
    suite: Suite,
    task: str,
    indices: Iterable[int],
    folder: Path,
    settings: Settings = Settings(),
    timeout: float | None = None,
) -> list[Path]:
    """Record the expert in the initial states `indices` of the split "demonstration"; return the files of all of them.

    Where a scene takes longer to be built, or an episode to be played, than `timeout` seconds, this process ends, with
    a traceback on stderr.

    Raises:
        PerennialError: the task has no expert, or `folder` holds demonstrations recorded otherwise.
    """
    expert = suite.expert(task)
    if expert is None:
        raise PerennialError(f"The suite {suite.name} has no scripted expert for {task}; choose another task.")
    paths = {index: folder / task / f"{index:04d}.safetensors" for index in indices}
    missing = [index for index, path in paths.items() if not _is_recorded(path, _header(suite, task, index, settings))]
    if missing:
        with _ending_after(timeout):
            environment = suite.make(task, settings.variant, settings.image_size)
        try:
            for index in missing:
                header = _header(suite, task, index, settings)
                with _ending_after(timeout):
                    tensors, success = _play(environment, expert, header)
                metadata = {HEADER: json.dumps(header | {"success": success})}
                write_bytes(paths[index], save(tensors, metadata=metadata))
        finally:
            with _ending_after(timeout):
                environment.close()
    return list(paths.values())


def record_all(
    suite_name: str,
    tasks: Sequence[str],
    count: int,
    folder: Path,
    workers: int = 2,
    on_episode: Callable[[Path], None] | None = None,
    settings: Settings = Settings(),
    first: int = 0,
    timeout: float = TIMEOUT,
) -> None:
    """Record `count` initial states of every task from `first` on in `workers` processes, and write `manifest.json`.

    Raises:
        PerennialError: see `record`; or one of several processes died, or took longer than `timeout` seconds for an
            episode.
    """
    end = first + count
    jobs = [(task, range(i, min(i + _JOB, end))) for i in range(first, end, _JOB) for task in tasks]
    report = on_episode or (lambda path: None)
    if workers <= 1:
        for task, indices in jobs:
            for path in _job(suite_name, task, indices, folder, settings):
                report(path)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            shared = (folder, settings, timeout)
            futures = [pool.submit(_job, suite_name, task, indices, *shared) for task, indices in jobs]
            try:
                for future in as_completed(futures):
                    for path in future.result():
                        report(path)
            except BrokenProcessPool as error:
                raise PerennialError(
                    "A recording process ended: memory ran out, a simulator crashed, or an episode took longer than "
                    f"{timeout:.0f} seconds; repeat the command to record the rest."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Write the sizes and hashes of all episodes in `folder`, and the hash over all of them, to `manifest.json`."""
    files = sorted(folder.rglob("*.safetensors"))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, {"format": 1, "data_sha256": data_hash(folder), "files": entries})


def _job(
    suite_name: str, task: str, indices: Iterable[int], folder: Path, settings: Settings, timeout: float | None = None
) -> list[Path]:
    return record(discovery.find("suites", suite_name, Suite)(), task, indices, folder, settings, timeout)


@contextmanager
def _ending_after(seconds: float | None) -> Iterator[None]:
    """End this process, with a traceback, where the block takes longer: a simulator that hangs hears nothing else."""
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _header(suite: Suite, task: str, index: int, settings: Settings) -> dict[str, Any]:
    """Everything that is known of an episode before it is played; odd episodes are disturbed by noise."""
    return asdict(settings) | {
        "format": 1,
        "suite": suite.name,
        "task": task,
        "initial_state": index,
        "instruction": _instruction(suite.tasks[task], index),
        "noise": settings.noise if index % 2 else 0.0,
    }


def _instruction(task: Task, index: int) -> str:
    """Paraphrases change every second episode, so that each is heard with and without noise."""
    return task.instructions[index // 2 % len(task.instructions)]


def _is_recorded(path: Path, header: dict[str, Any]) -> bool:
    """Whether `path` holds the episode of `header`; a damaged file does not."""
    try:
        found, _ = read(path)
    except PerennialError:
        return False
    for name, value in header.items():
        if found.get(name) != value:
            raise PerennialError(
                f"{path} was recorded with {name}={found.get(name)!r}, not {value!r}; "
                "choose another folder or delete it."
            )
    return True


def _play(environment: Environment, expert: Expert, header: dict[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
    """One episode of the expert and whether it succeeded."""
    index = header["initial_state"]
    rng = stream(0, "demonstration noise", header["suite"], header["task"], header["variant"], index)
    space = environment.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    if not space.is_bounded():
        raise PerennialError(
            f"The actions of {header['task']} have no bounds ({space}), so noise has no scale: give its environment a "
            "bounded action_space."
        )
    noise = header["noise"] * (space.high - space.low).astype(np.float64) / 2
    images: list[Any] = []
    image_steps: list[int] = []
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    state, info = environment.reset(options={"split": "demonstration", "index": index})
    ended = False
    while not ended:
        if len(actions) % header["image_every"] == 0:
            image_steps.append(len(actions))
            images.append(environment.render())
        action = expert(environment)
        states.append(state)
        actions.append(action)
        disturbed = np.clip(action + noise * rng.standard_normal(action.shape), space.low, space.high)
        state, _, terminated, truncated, info = environment.step(disturbed.astype(np.float32))
        ended = terminated or truncated
    tensors = {
        "images": np.stack(images),
        "image_steps": np.array(image_steps, np.int32),
        "states": np.array(states, np.float32),
        "actions": np.array(actions, np.float32),
    }
    return tensors, bool(info["is_success"])
