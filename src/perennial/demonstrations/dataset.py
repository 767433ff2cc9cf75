"""Reads recorded demonstrations and cuts them into batches.

A recording is a folder with one safetensors file per episode, `TASK/INDEX.safetensors`. Its tensors are `images` uint8
[T, V, H, W, 3], `image_steps` int32 [T], `states` float32 [L, S] and `actions` float32 [L, D]; its header carries one
JSON object with everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from perennial.errors import PerennialError, unknown
from perennial.policies.base import Batch, Observation, Policy
from perennial.storage.atomic import sha256

HEADER = "demonstration"


@dataclass(frozen=True)
class Demonstration:
    """One successful episode of an expert, with L steps and T images.

    Attributes:
        task: its name.
        instruction: what the expert was told, one of the task's training paraphrases.
        initial_state: index of the initial state in the split "demonstration".
        images: uint8 [T, V, H, W, 3].
        image_steps: int32 [T], the step before which each image was taken.
        states: float32 [L, S], before each step.
        actions: float32 [L, D], what the expert wanted to do; what was done may have been disturbed by noise.
    """

    task: str
    instruction: str
    initial_state: int
    images: np.ndarray
    image_steps: np.ndarray
    states: np.ndarray
    actions: np.ndarray


def load(folder: Path, tasks: Iterable[str] | None = None) -> list[Demonstration]:
    """Read the successful demonstrations in `folder`, in the order of `tasks` (or of the alphabet) and initial states.

    Raises:
        PerennialError: the folder has no successful demonstration of some task, or a file is damaged.
    """
    known = recorded(folder)
    demonstrations: list[Demonstration] = []
    for task in known if tasks is None else tasks:
        if task not in known:
            raise unknown("demonstrated task", task, known)
        found = [read(path) for path in sorted((folder / task).glob("*.safetensors"))]
        successful = [demonstration for header, demonstration in found if header["success"]]
        if not successful:
            raise PerennialError(
                f"None of the {len(found)} demonstrations of {task} in {folder} is successful; record more of them."
            )
        demonstrations += successful
    return demonstrations


def recorded(folder: Path) -> list[str]:
    """The tasks that were demonstrated in `folder`, in the order of the alphabet.

    Raises:
        PerennialError: there is none.
    """
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not found:
        raise PerennialError(f"{folder} holds no demonstrations; record some with `perennial demos {folder}`.")
    return found


def absolute(folder: str) -> str:
    """The same folder of demonstrations, named so that it is found from everywhere; "" stays, as it names none."""
    return folder and str(Path(folder).absolute())


def require_recorded(folder: str, option: str, task: str = "") -> None:
    """See that there is a demonstration, of `task` or of any, and that the first one can be read.

    Args:
        folder: of demonstrations; "" names none.
        option: by which the folder was chosen.
        task: its name; "" is any.

    Raises:
        PerennialError: there is none, or it cannot be read.
    """
    found = Path(folder, task).glob("*.safetensors" if task else "*/*.safetensors")
    first = min(found, default=None)
    if first is None:
        of, only = (f" of {task}", f" --tasks {task}") if task else ("", "")
        if not folder:
            raise PerennialError(f"There is no demonstration{of}, as no folder is named; set --{option}.")
        raise PerennialError(
            f"There is no demonstration{of} in {folder!r}; record some by `perennial demos {folder}{only}`, or set "
            f"--{option}."
        )
    read(first)


def succeeded(path: Path) -> bool:
    """Whether the expert succeeded in the episode of a file that was just recorded."""
    with safe_open(path, framework="numpy") as file:
        return bool(json.loads(file.metadata()[HEADER])["success"])


def read(path: Path) -> tuple[dict[str, Any], Demonstration]:
    """One episode, successful or not, with its header.

    Raises:
        PerennialError: the file is missing, damaged or no demonstration.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in ("images", "image_steps", "states", "actions")}
        return header, Demonstration(header["task"], header["instruction"], header["initial_state"], **tensors)
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        raise PerennialError(
            f"The demonstration {path} cannot be read ({error}); delete it and record it anew."
        ) from error


def to_batch(demonstrations: list[Demonstration], policy: Policy) -> Batch:
    """One row per image: what the policy sees there, and the expert's next `policy.imitated_steps` actions.

    A window that reaches past the end repeats the last action; tokens that begin to act there are masked.

    Raises:
        PerennialError: images are not of the size that the policy asks for.
    """
    for demonstration in demonstrations:
        if demonstration.images.shape[2:4] != (policy.image_size, policy.image_size):
            height, width = demonstration.images.shape[2:4]
            raise PerennialError(
                f"A demonstration of {demonstration.task} has images of {height} x {width} pixels, but the policy asks "
                f"for {policy.image_size}; record with --image-size {policy.image_size}, or resize them."
            )
    windows, remaining = [], []
    for demonstration in demonstrations:
        length = len(demonstration.actions)
        steps = demonstration.image_steps[:, None] + np.arange(policy.imitated_steps)
        windows.append(demonstration.actions[np.minimum(steps, length - 1)])
        remaining.append(length - demonstration.image_steps)
    observation = Observation(
        np.concatenate([d.images for d in demonstrations]),
        tuple(d.instruction for d in demonstrations for _ in d.image_steps),
        np.concatenate([d.states[d.image_steps] for d in demonstrations]),
    )
    return Batch(
        observation=observation,
        sample=policy.encode(np.concatenate(windows)),
        mask=policy.token_steps[None, :] < np.concatenate(remaining)[:, None],
    )


def data_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of all episode files, as hexadecimal digits."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()
