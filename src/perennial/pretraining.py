"""Behaviour cloning of a base policy from demonstrations, and the manifest that says what came out."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from perennial import __version__, discovery
from perennial.demonstrations.dataset import Demonstration, data_hash, load, to_batch
from perennial.errors import LearningError, PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.learning.stage import learner_threads
from perennial.policies.base import Batch, Observation, Policy
from perennial.randomness import stream
from perennial.rollout.workers import Cast, WorkerConfig, start_workers
from perennial.storage.atomic import commit_folder
from perennial.suites.base import Suite

if TYPE_CHECKING:
    from perennial.commands import Pretrain

SHIFT = 2
"""Images are shifted by up to this many pixels in each direction while training."""
WORD_DROPOUT = 0.25
"""Share of words left out of a scrambled instruction."""
WARMUP_STEPS = 200


def pretrain(options: Pretrain, console: Console) -> None:
    """Clone the demonstrations in `options.demonstrations` into a new checkpoint at `options.out`.

    Raises:
        PerennialError: the output exists, a number is out of range, or there are no demonstrations.
    """
    for name, least in (("steps", 1), ("batch_size", 1), ("episodes", 0)):
        if getattr(options, name) < least:
            raise PerennialError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}."
            )
    if not options.learning_rate > 0:
        raise PerennialError(f"--learning-rate is {options.learning_rate}; it must be above 0.")
    if options.out.exists():
        raise PerennialError(f"{options.out} exists already; choose another folder for the checkpoint.")
    suite = discovery.find("suites", options.suite, Suite)()
    demonstrations = load(options.demonstrations, options.tasks or None)
    policy = fresh_policy(options.policy, suite, demonstrations, options.seed)
    losses = clone(policy, to_batch(demonstrations, policy), options)
    for step, loss in enumerate(track(losses, "cloning", total=options.steps, console=console), 1):
        if step % max(1, options.steps // 20) == 0:
            console.print(f"step {step}/{options.steps}  loss {loss:.3f}", highlight=False)
    manifest = {
        "perennial": __version__,
        "command": shlex.join(["perennial", *sys.argv[1:]]),
        "seed": options.seed,
        "data_sha256": data_hash(options.demonstrations),
        "demonstrations": {task: sum(d.task == task for d in demonstrations) for task in tasks_of(demonstrations)},
    }

    success: dict[str, dict[str, float]] = {}

    def write(target: Path) -> None:
        policy.save(target, torch.bfloat16)
        (target / "pretraining.json").write_text(json.dumps(manifest | {"success": success}, indent=2) + "\n")

    commit_folder(options.out, write)  # before it is measured, so that a simulator that fails loses nothing
    if options.episodes:
        success |= measure(options, options.out, tasks_of(demonstrations), console)
        commit_folder(options.out, write)
    console.print(f"Checkpoint: {options.out}")


def tasks_of(demonstrations: list[Demonstration]) -> list[str]:
    """The tasks that were demonstrated, in alphabetical order."""
    return sorted({d.task for d in demonstrations})


def fresh_policy(name: str, suite: Suite, demonstrations: list[Demonstration], seed: int) -> Policy:
    """A small policy with random weights that speaks the suite's language and the data's units."""
    sentences = [i for task in suite.tasks.values() for i in (*task.instructions, task.evaluation_instruction)]
    actions = np.concatenate([d.actions for d in demonstrations])
    states = np.concatenate([d.states for d in demonstrations])
    return discovery.find("policies", name, Policy).fresh(sentences, actions, states, seed)


def clone(policy: Policy, batch: Batch, options: Pretrain) -> Iterator[float]:
    """Take `options.steps` AdamW steps on `policy`, yielding each step's loss."""
    torch.set_num_threads(learner_threads())
    parameters = list(policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(options.steps):
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
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
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
                played = workers.collect(evaluation_episodes(suite.tasks[name], "id", options.episodes, temperature))
                success.setdefault(name, {})[decoder] = sum(t.success for t in played) / len(played)
            console.print(f"{name}  {success[name]}", highlight=False)
    return success
