"""Plays the policies between a base and what was fine-tuned from it, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perennial import discovery
from perennial.demonstrations.dataset import load, to_batch
from perennial.errors import PerennialError
from perennial.evaluation.race import Runner, race
from perennial.merging.adapters import is_adapter, learned, open_adapter
from perennial.merging.groups import Coefficients, by_name
from perennial.merging.linear import interpolate
from perennial.merging.state_dicts import require_same_tensors, shapes
from perennial.policies._base_identity import sample
from perennial.policies._placement import DType, load_policy
from perennial.policies.base import Batch, Policy
from perennial.randomness import stream
from perennial.rollout.trajectory import Episode
from perennial.rollout.workers import Cast, WorkerConfig, start_workers
from perennial.strategies._weights import looking_through
from perennial.strategies.base import ROWS
from perennial.suites.base import Suite, Task

DECISIONS = 256
"""Decisions of demonstrations that a loss is taken on."""


@dataclass(frozen=True)
class Pair:
    """A policy with the weights of the base, and the fine-tuned weights by base parameter name."""

    policy: Policy
    base: Mapping[str, Tensor]
    finetuned: Mapping[str, Tensor]

    def merged(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """(1 - alpha) base + alpha fine-tuned, with the alpha of each parameter's group."""
        alpha = by_name(self.policy.groups, coefficients)
        return {name: interpolate(weights, self.finetuned[name], alpha[name]) for name, weights in self.base.items()}


def open_pair(policy: str, base: Path, finetuned: Path, device: str = "cpu", dtype: DType | None = None) -> Pair:
    """Load a base checkpoint, and a checkpoint, a PEFT adapter folder or a run's folder of weights made from it.

    The policy lies on `device`, the weights to merge in main memory.

    Raises:
        PerennialError: a folder cannot be read, or the two have different tensors.
    """
    finetuned = learned(finetuned)
    start = load_policy(policy, base, device, dtype)
    weights = {name: tensor.cpu() for name, tensor in start.acting_weights().items()}
    if is_adapter(finetuned):
        adapter = open_adapter(finetuned)
        deltas = adapter.deltas
        for name, layer in adapter.layers.items():
            parameter = weights.get(f"{name}.weight")
            if parameter is None or tuple(parameter.shape) != layer.shape:
                raise PerennialError(
                    f"The adapter {finetuned} updates {name}.weight of shape {list(layer.shape)}, which the base "
                    f"{base} does not have; give the adapter's own base."
                )
        adapter.require_base({name: sample(weights[name]) for name in deltas}, base)
        end = {n: (w.float() + deltas[n]).to(w.dtype) if n in deltas else w for n, w in weights.items()}
    elif (finetuned / "config.json").is_file():
        end = load_policy(policy, finetuned, dtype=dtype).acting_weights()
    else:
        end = _weights_alone(finetuned)
    require_same_tensors(shapes(weights), shapes(end))
    return Pair(start, weights, end)


def _weights_alone(folder: Path) -> dict[str, Tensor]:
    """What a run without an adapter writes after each task."""
    try:
        weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise PerennialError(
            f"{folder} holds no weights ({error}); give a checkpoint, an adapter, or tasks/NN-NAME of a run."
        ) from error
    return weights


@dataclass(frozen=True)
class Plan:
    """What is played.

    Attributes:
        tasks: fine-tuned for, played in `variant`.
        generalist: tasks of the base that should still be done, played in the suite's first variant.
        episodes: most training states of each task.
        temperature: of action sampling.
        seed: names its streams.
    """

    suite: str
    tasks: Sequence[str]
    variant: str
    generalist: Sequence[str]
    episodes: int
    temperature: float
    seed: int

    @property
    def objectives(self) -> list[slice]:
        """The columns of the target tasks, and of the generalist's where there are some."""
        ends = (len(self.tasks), len(self.tasks) + len(self.generalist))
        return [slice(0, ends[0])] + ([slice(*ends)] if self.generalist else [])


def sweep(
    pair: Pair,
    plan: Plan,
    candidates: Sequence[Coefficients],
    cast: Cast,
    workers: WorkerConfig,
    on_episodes: Callable[[Coefficients, int], None],
) -> list[Runner]:
    """Let every candidate's policy play the same states with the same draws; hopeless ones stop early."""
    suite = discovery.find("suites", plan.suite, Suite)()
    told = [(suite.tasks[name], plan.variant) for name in plan.tasks]
    told += [(suite.tasks[name], suite.variants[0]) for name in plan.generalist]
    with closing(start_workers(workers, cast, pair.base)) as playing:

        def play(number: int, rounds: range) -> np.ndarray:
            playing.broadcast(pair.merged(candidates[number]))
            asked = [_episode(*case, index, plan.temperature) for index in rounds for case in told]
            outcomes = [trajectory.success for trajectory in playing.collect(asked)]
            on_episodes(candidates[number], len(asked))
            return np.array(outcomes).reshape(len(rounds), len(told))

        return race(len(candidates), play, plan.episodes, objectives=plan.objectives)


def _episode(task: Task, variant: str, index: int, temperature: float) -> Episode:
    """From a training state, so that evaluation states stay unseen."""
    return Episode(
        task=task.name,
        variant=variant,
        split="training",
        initial_state=index,
        instruction=task.instructions[index % len(task.instructions)],
        temperature=temperature,
        key=("alpha", task.name, variant, index),
        group=index,
        keep=False,
    )


def losses(pair: Pair, candidates: Sequence[Coefficients], folder: Path, tasks: Sequence[str] | None) -> list[float]:
    """The mean imitation loss of each candidate on up to `DECISIONS` decisions of demonstrations.

    Args:
        pair: what is merged.
        candidates: coefficients.
        folder: of demonstrations that were not trained on.
        tasks: only these; None takes all that the folder holds.
    """
    batch = to_batch(load(folder, tasks), pair.policy)
    rows = stream(0, "alpha", str(tasks)).permutation(len(batch))[:DECISIONS]
    return [_loss(pair, pair.merged(coefficients), batch.take(np.sort(rows))) for coefficients in candidates]


@torch.no_grad()
def _loss(pair: Pair, weights: Mapping[str, Tensor], batch: Batch) -> float:
    placed = {name: tensor.to(pair.policy.device) for name, tensor in weights.items()}
    with looking_through(pair.policy, placed):
        return float(torch.cat([pair.policy.imitation_loss(part) for part in batch.parts(ROWS)]).mean())


def likeliest(target: Sequence[float], base: Sequence[float]) -> int:
    """The candidate that a rule without any rollout takes: the least sum of both losses; the first of equals.

    Losses are mean negative log-likelihoods, so under this candidate both sets of demonstrations, each weighing
    the same, are likeliest together. Not from the paper, which has no such rule.
    """
    return int(np.argmin(np.add(target, base)))


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (target, generalist) points are not dominated: none is better in one and at least as good in the other."""
    return [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points) for p in points]
