"""Behaviour cloning of a base policy from demonstrations, and the manifest that says what came out."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import nn

from perennial import __version__, discovery, machine
from perennial.demonstrations.dataset import Demonstration, data_hash, load, to_batch
from perennial.errors import LearningError, PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.policies._sizes import STEP
from perennial.policies.base import Batch, Observation, Policy
from perennial.randomness import stream
from perennial.rollout.workers import Cast, WorkerConfig, start_workers
from perennial.storage import lock
from perennial.storage.atomic import MANIFEST, clean, commit_folder, verify, write_json
from perennial.storage.tensors import load_optimizer, load_tensors, save_optimizer, save_tensors
from perennial.strategies._weights import restore
from perennial.suites.base import Suite

if TYPE_CHECKING:
    from perennial.commands import Pretrain

SHIFT = 2
"""Images are shifted by up to this many pixels in each direction while training."""
WORD_DROPOUT = 0.25
"""Share of words left out of a scrambled instruction."""
WARMUP_STEPS = 200
COMMIT_STEPS = 250
"""Steps between two commits: a killed process loses no more of them."""
BEGUN, DESCRIPTION = "begun.json", "pretraining.json"


def pretrain(options: Pretrain, console: Console) -> None:
    """Clone the demonstrations in `options.demonstrations` into a new checkpoint at `options.out`.

    What was interrupted goes on from its last commit, in `OUT.unfinished`, when the command is repeated, and ends with
    the same checkpoint bit for bit.

    Raises:
        PerennialError: the output exists, a number is out of range, there are no demonstrations, or what is unfinished
            was begun with other options.
    """
    _check(options)
    unfinished = options.out.parent / f"{options.out.name}.unfinished"
    if options.out.exists() and not (unfinished / BEGUN).exists():
        raise PerennialError(f"{options.out} exists already; choose another folder for the checkpoint.")
    demonstrations = load(options.demonstrations, options.tasks or None)
    data = data_hash(options.demonstrations)
    unfinished.mkdir(parents=True, exist_ok=True)
    with lock.acquire(unfinished):
        clean(unfinished)
        threads = _claim(unfinished, options, data)
        if not options.out.exists():
            policy = _learn(options, demonstrations, unfinished / "commit", threads, console)
            manifest = {
                "perennial": __version__,
                "command": shlex.join(["perennial", *sys.argv[1:]]),
                "seed": options.seed,
                "data_sha256": data,
                "demonstrations": {t: sum(d.task == t for d in demonstrations) for t in tasks_of(demonstrations)},
                "success": {},
            }

            def write(target: Path) -> None:
                policy.save(target, torch.bfloat16)
                (target / DESCRIPTION).write_text(json.dumps(manifest, indent=2) + "\n")

            commit_folder(options.out, write)  # before it is measured, so that a simulator that fails loses nothing
        if options.episodes:
            _write_success(options.out, measure(options, options.out, tasks_of(demonstrations), console))
        shutil.rmtree(unfinished)
    console.print(f"Checkpoint: {escape(str(options.out))}", highlight=False, soft_wrap=True)


def _check(options: Pretrain) -> None:
    """Numbers are in range."""
    for name, least in (("steps", 1), ("batch_size", 1), ("episodes", 0)):
        if getattr(options, name) < least:
            raise PerennialError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}."
            )
    if not options.learning_rate > 0:
        raise PerennialError(f"--learning-rate is {options.learning_rate}; it must be above 0.")
    if options.width <= 0 or options.width % STEP:
        raise PerennialError(f"--width is {options.width}; it must be a multiple of {STEP} above 0.")


def _claim(unfinished: Path, options: Pretrain, data: str) -> int:
    """Write down in the folder `unfinished` what is learned there, or see that it was the same.

    Returns:
        the number of threads with which it was begun.

    Raises:
        PerennialError: it was not.
    """
    asked = {
        name: getattr(options, name)
        for name in ("steps", "batch_size", "learning_rate", "suite", "policy", "width", "seed")
    }
    asked |= {"tasks": list(options.tasks), "data_sha256": data}
    path = unfinished / BEGUN
    if not path.exists():
        write_json(path, asked | {"threads": machine.cores()})
    begun = {"width": 1.0} | json.loads(path.read_text())  # it may be older than that option
    for name, value in asked.items():
        if begun[name] != value:
            raise PerennialError(
                f"{unfinished} was begun with {name} {begun[name]!r}, not {value!r}; repeat that command, or delete "
                "the folder to begin anew."
            )
    return int(begun.get("threads", machine.cores()))


def _learn(
    options: Pretrain, demonstrations: list[Demonstration], commit: Path, threads: int, console: Console
) -> Policy:
    """The policy after `options.steps` steps, of which those in the folder `commit` are done already."""
    suite = discovery.find("suites", options.suite, Suite)()
    policy = fresh_policy(options.policy, suite, demonstrations, options.seed, options.width)
    parameters = dict(policy.model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.01, betas=(0.9, 0.98))
    done = 0
    if commit.exists():
        verify(commit)
        done = int(json.loads((commit / "state.json").read_text())["steps"])
        restore(policy, load_tensors(commit / "weights.safetensors"))
        load_optimizer(optimizer, parameters, commit / "optimizer.safetensors")
        console.print(f"Going on after step {done}.", highlight=False)

    torch.set_num_threads(threads)
    losses = clone(policy, optimizer, to_batch(demonstrations, policy), options, done)
    shown = track(losses, "cloning", total=options.steps, completed=done, console=console)
    for step, loss in enumerate(shown, done + 1):
        if step % COMMIT_STEPS == 0:
            commit_folder(commit, partial(_write_commit, parameters, optimizer, step))
        if step % max(1, options.steps // 20) == 0:
            console.print(f"step {step}/{options.steps}  loss {loss:.3f}", highlight=False)
    return policy


def _write_commit(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, target: Path
) -> None:
    """What `_learn` needs to go on after so many steps."""
    save_tensors(parameters, target / "weights.safetensors")
    save_optimizer(optimizer, parameters, target / "optimizer.safetensors")
    write_json(target / "state.json", {"steps": steps})


def _write_success(checkpoint: Path, success: dict[str, dict[str, float]]) -> None:
    """Add what was measured to the description of a checkpoint."""

    def write(target: Path) -> None:
        shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        manifest = json.loads((checkpoint / DESCRIPTION).read_text())
        (target / DESCRIPTION).write_text(json.dumps(manifest | {"success": success}, indent=2) + "\n")

    commit_folder(checkpoint, write)


def tasks_of(demonstrations: list[Demonstration]) -> list[str]:
    """The tasks that were demonstrated, in alphabetical order."""
    return sorted({d.task for d in demonstrations})


def fresh_policy(name: str, suite: Suite, demonstrations: list[Demonstration], seed: int, width: float) -> Policy:
    """A small policy with random weights that speaks the suite's language and the data's units."""
    sentences = [i for task in suite.tasks.values() for i in (*task.instructions, task.evaluation_instruction)]
    actions = np.concatenate([d.actions for d in demonstrations])
    states = np.concatenate([d.states for d in demonstrations])
    return discovery.find("policies", name, Policy).fresh(sentences, actions, states, seed, width)


def clone(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, options: Pretrain, first: int = 0
) -> Iterator[float]:
    """Take the steps `first` .. `options.steps` - 1 on `policy`, yielding each step's loss."""
    for step in range(first, options.steps):
        rng = stream(options.seed, "pretrain", step)
        part = batch.take(rng.integers(len(batch), size=options.batch_size))
        part = replace(part, observation=augmented(part.observation, rng))
        warmth = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmth * cosine
        loss = policy.imitation_loss(part).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LearningError(f"The loss became {value} at step {step}; lower --learning-rate.")
        yield value


def augmented(observation: Observation, rng: np.random.Generator) -> Observation:
    """Shifted images and scrambled words, so that neither a place in the image nor a phrase is learned by heart."""
    instructions = tuple(scrambled(words, rng) for words in observation.instructions)
    return replace(observation, images=shifted(observation.images, rng), instructions=instructions)


def scrambled(instruction: str, rng: np.random.Generator) -> str:
    """Half of the time the words as they are, else some of them, at least one, in any order."""
    words = np.array(instruction.split())
    if rng.random() < 0.5:
        return instruction
    kept = rng.permutation(words)[: max(1, int((rng.random(len(words)) > WORD_DROPOUT).sum()))]
    return " ".join(kept)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`images` uint8 [N, V, H, W, 3], each moved by up to `SHIFT` pixels with its border repeated."""
    height, width = images.shape[2:4]
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    offsets = rng.integers(2 * SHIFT + 1, size=(len(images), 2))
    return np.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)])


def measure(options: Pretrain, checkpoint: Path, tasks: list[str], console: Console) -> dict[str, dict[str, float]]:
    """Success of the saved checkpoint in each task, 0 to 1, by decoder."""
    suite = discovery.find("suites", options.suite, Suite)()
    weights = discovery.find("policies", options.policy, Policy).load(checkpoint).acting_weights()
    cast = Cast(options.suite, options.policy, checkpoint, options.seed)
    success: dict[str, dict[str, float]] = {}
    with closing(start_workers(WorkerConfig(), cast, weights)) as workers:
        for name in track(tasks, "measuring", console=console):
            for decoder, temperature in (("sampled", 1.0), ("greedy", 0.0)):
                played = workers.collect(evaluation_episodes(suite, name, "id", options.episodes, temperature))
                success.setdefault(name, {})[decoder] = sum(t.success for t in played) / len(played)
            console.print(f"{name}  {success[name]}", highlight=False)
    return success
