"""Checks that every strategy passes, on the toy policy; authors of plug-ins run them over theirs.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(lambda: MyStrategy(coefficient=1.0))

Each check takes a function that makes the strategy, and raises AssertionError with a sentence. Let buffers be small
enough to fill within a few episodes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from perennial.learning.base import gradient_step
from perennial.learning.grpo import GRPO, weighted_batch
from perennial.learning.optimizer import AdamWConfig, build_optimizer, optimised
from perennial.learning.ppo import PPO
from perennial.learning.sft import SFT
from perennial.policies.base import Batch, Observation, Outputs, Policy
from perennial.policies.lora import LoRA, add_adapter
from perennial.randomness import stream
from perennial.rollout.collect import Environments, play
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies.base import Strategy
from perennial.strategies.composition import Strategies
from perennial.strategies.sequential import Sequential
from perennial.suites.base import Task
from perennial.testing.toy import ToyPolicy, ToySuite

Make = Callable[[], Strategy]
Learning = Literal["grpo", "ppo", "sft"]
EVERY: tuple[Learning, ...] = get_args(Learning)

SUITE = ToySuite()
TASKS = [SUITE.tasks[name] for name in ("up", "left", "right")]
EVALUATED = [*TASKS, SUITE.tasks["up-left"]]


@dataclass
class Run:
    """A small continual run whose optimiser has no state, so that all memory of the past is the strategy's."""

    strategies: Strategies
    adapter: bool
    learning: Learning = "sft"

    def __post_init__(self) -> None:
        self.policy = ToyPolicy(seed=1)
        if self.adapter:
            add_adapter(self.policy, LoRA(rank=4, alpha=4), seed=1)
        if self.learning == "ppo":
            self.policy.add_value_head(seed=1)
        self.environments = Environments(SUITE, self.policy.image_size)

    def teach(self, task: Task, updates: int = 3, first: int = 0, last: bool = True) -> None:
        """The updates `first` .. `updates` - 1 of a task; the task begins with update 0 and ends if `last`."""
        if first == 0:
            self.strategies.before_task(task, self.policy)
        for number in range(first, updates):
            self.update(task, number)
        if last:

            def collect(
                count: int, task: str | None = None, variant: str = "id", first: int = 0, learned: Task = task
            ) -> list[Trajectory]:
                return self.play(SUITE.tasks[task] if task else learned, count, "collect", 0, variant, first)

            self.strategies.after_task(task, self.policy, collect)
            self.strategies.remember(task, self.policy, collect)

    def update(self, task: Task, number: int) -> None:
        """One step of gradient descent in two micro-batches."""
        batch = self.batch(task, number)
        config = AdamWConfig(0.3, warmup_steps=0, max_grad_norm=math.inf, micro_batch=math.ceil(len(batch) / 2))
        groups = build_optimizer(self.policy, self.strategies, config).param_groups
        optimizer = torch.optim.SGD([{"params": group["params"], "scale": group["scale"]} for group in groups])
        losses = {"sft": SFT(batch_size=len(batch)).loss, "ppo": PPO().loss, "grpo": GRPO().loss}
        rng = stream(1, "update", task.name, number)
        gradient_step(self.policy, batch, losses[self.learning], self.strategies, optimizer, config, rng)

    def batch(self, task: Task, number: int) -> Batch:
        """What the update of that number learns from."""
        return self.demonstrations(task, number) if self.learning == "sft" else self.rollouts(task, number)

    def demonstrations(self, task: Task, number: int) -> Batch:
        """What the expert would do at 16 random places."""
        states = stream(1, "place", task.name, number).uniform(-0.5, 0.5, (16, 2)).astype(np.float32)
        images = np.stack([_view(task, state) for state in states])
        direction = np.clip((np.array(SUITE.targets[task.name]) - states) / 0.3, -1, 1)
        sample = self.policy.encode(np.repeat(direction[:, None], 2, axis=1))
        return Batch(Observation(images, (task.instructions[0],) * 16, states), sample, np.ones((16, 4), bool))

    def rollouts(self, task: Task, number: int) -> Batch:
        """Decisions of 8 episodes, assessed by the value head; or by each other, of which every second one succeeds."""
        played = self.play(task, 8, "rollout", number)
        if self.learning == "ppo":
            return PPO().assess(self.policy, played)[0]
        graded = [dataclasses.replace(t, success=i % 2 == 0) for i, t in enumerate(played)]
        return weighted_batch(self.policy, graded, self.strategies.wants_all())[0]

    def play(
        self, task: Task, count: int, purpose: str, number: int, variant: str = "id", first: int = 0
    ) -> list[Trajectory]:
        """Episodes of the weights that the strategy chooses for `task`."""
        actor = ToyPolicy()
        actor.model.load_state_dict(dict(self.strategies.policy_for(task, self.policy)))
        episodes = [
            Episode(
                task.name, variant, "training", i, task.instructions[0], 1.0, (purpose, task.name, number, i), i // 4
            )
            for i in range(first, first + count)
        ]
        return play(actor, self.environments, episodes, seed=1, slots=count)

    def weights(self) -> dict[str, Tensor]:
        """What learns, and what acts in every task."""
        acting = {
            f"{task.name}/{name}": value
            for task in EVALUATED
            for name, value in self.strategies.policy_for(task, self.policy).items()
        }
        return {name: p.detach().clone() for name, p in optimised(self.policy).items()} | acting

    def resumed(self) -> Run:
        """Another run that knows only the base, the trained parameters and the strategy's state, through bytes."""
        fresh = tuple(_fresh(member) for member in self.strategies.members)
        other = Run(Strategies(fresh), self.adapter, self.learning)
        with torch.no_grad():
            for name, parameter in optimised(other.policy).items():
                parameter.copy_(optimised(self.policy)[name])
        state = safetensors.torch.load(safetensors.torch.save(self.strategies.state_dict()))
        other.strategies.load_state_dict(state, other.policy)
        return other


def _view(task: Task, state: np.ndarray) -> np.ndarray:
    environment = SUITE.make(task.name)
    environment.position = state
    return np.asarray(environment.render())


def _fresh(strategy: Strategy) -> Strategy:
    return type(strategy)(**{f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.init})


def _runs(*members: Make, ways: Sequence[Learning] = ("grpo", "sft")) -> Iterator[Run]:
    """A run for each objective: reinforcement with an adapter, imitation with full fine-tuning."""
    for learning in ways:
        yield Run(Strategies(tuple(make() for make in members)), adapter=learning != "sft", learning=learning)


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], sentence: str) -> None:
    assert left.keys() == right.keys(), f"{sentence}: {sorted(left.keys() ^ right.keys())[:3]}"
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{sentence}: {different[:3]}"


def _resumes_exactly(run: Run) -> None:
    for task in TASKS[:2]:
        run.teach(task)
    run.teach(TASKS[2], updates=2, last=False)
    other = run.resumed()
    for each in (run, other):
        each.teach(TASKS[2], first=2)
        each.teach(EVALUATED[3])
    _same(run.weights(), other.weights(), "a resumed run ends with other weights")
    _same(run.strategies.state_dict(), other.strategies.state_dict(), "a resumed run ends with another state")


def check_resume(make: Make) -> None:
    """Stopped in the middle of the third task and resumed from its state, a run ends bit for bit the same."""
    for run in _runs(make, ways=EVERY):
        _resumes_exactly(run)


def check_learning(make: Make) -> None:
    """Under every objective the weights move, stay finite, and the same parameters stay trainable."""
    for run in _runs(make, ways=EVERY):
        before = run.policy.acting_weights()
        trainable = list(run.policy.trainable())
        for task in TASKS:
            run.teach(task)
            after = run.policy.acting_weights()
            assert any(not torch.equal(after[name], before[name]) for name in before), f"{task.name} taught nothing"
            assert all(torch.isfinite(value).all() for value in after.values()), f"{task.name} gave infinite weights"
            assert list(run.policy.trainable()) == trainable, "other parameters are trainable after a task"


def check_zero_coefficients(make: Make) -> None:
    """With every field called `coefficient` or `..._coefficient` at 0 it is sequential fine-tuning, bit for bit."""
    zero = {f.name: 0.0 for f in dataclasses.fields(make()) if f.init and f.name.endswith("coefficient")}
    if not zero:
        return
    for run, sequential in zip(
        _runs(lambda: dataclasses.replace(make(), **zero), ways=EVERY), _runs(ways=EVERY), strict=True
    ):
        for task in TASKS:
            run.teach(task)
            sequential.teach(task)
        _same(run.weights(), sequential.weights(), f"with {zero} it is not sequential fine-tuning")


def check_composition(make: Make) -> None:
    """Beside a strategy that does nothing it is itself, and beside one that pulls to zero the two resume exactly."""
    for alone, before, after in zip(_runs(make), _runs(Sequential, make), _runs(make, Sequential), strict=True):
        for run in (alone, before, after):
            run.teach(TASKS[0])
            run.teach(TASKS[1])
        _same(alone.weights(), before.weights(), "an idle strategy before it changes the result")
        _same(alone.weights(), after.weights(), "an idle strategy after it changes the result")
    _resumes_exactly(next(_runs(make, _PullToZero)))


def check_state(make: Make) -> None:
    """The state is flat tensors that survive a safetensors file and a fresh object unchanged."""
    for run in _runs(make):
        for task in TASKS[:2]:
            run.teach(task)
            state = run.strategies.state_dict()
            assert all(isinstance(value, Tensor) for value in state.values()), "the state holds more than tensors"
            assert not any(value.requires_grad for value in state.values()), "the state is part of a graph"
            _same(state, run.resumed().strategies.state_dict(), "the state changes when it is loaded")


def check_bounds(make: Make) -> None:
    """What is kept grows neither with the number of updates nor when old tasks are taught again."""
    for run in _runs(make):
        run.teach(TASKS[0])
        run.teach(TASKS[1], updates=1, last=False)
        early = _bytes(run)
        run.teach(TASKS[1], updates=4, first=1, last=False)
        assert _bytes(run) == early, "the state grows with every update"
        run.teach(TASKS[1], updates=4, first=4)
        for _ in range(2):
            once = _bytes(run)
            for task in TASKS[:2]:
                run.teach(task)
        assert _bytes(run) <= once, "the state grows although no new task is taught"


def check_acting_weights(make: Make) -> None:
    """For every task it gives all base parameters, as copies that the learner does not share."""
    for run in _runs(make):
        names = run.policy.acting_weights().keys()
        run.teach(TASKS[0])
        before = run.weights()
        for task in EVALUATED:
            weights = run.strategies.policy_for(task, run.policy)
            assert weights.keys() == names, f"the weights for {task.name} are not those of the base"
            for value in weights.values():
                value.fill_(float("nan"))
        _same(before, run.weights(), "the acting weights share memory with what is learned or kept")


def check_parameter_groups(make: Make) -> None:
    """Its parameter groups, if it sets any, hold every trainable parameter exactly once."""
    for run in _runs(make):
        groups = run.strategies.parameter_groups(run.policy)
        if groups is not None:
            grouped = [name for group in groups for name in group.parameters]
            assert sorted(grouped) == sorted(run.policy.trainable()), "the groups are not a partition"


def check_parts(make: Make) -> None:
    """Its losses on the parts of what is learned from or replayed add up to that on all of it, however it is cut."""
    for run in _runs(make, ways=EVERY):
        for task in TASKS[:2]:
            run.teach(task)
        run.teach(TASKS[2], updates=2, last=False)
        for strategy in run.strategies.members:
            replayed = strategy.replay(stream(1, "replay"), 16)
            if replayed is not None:
                _parts_add_up(run.policy, strategy.replay_loss, replayed)
            _parts_add_up(run.policy, strategy.batch_loss, run.batch(TASKS[2], 2))


@torch.no_grad()
def _parts_add_up(policy: Policy, loss: Callable[[Outputs, Batch], Tensor | None], whole: Batch) -> None:
    expected = loss(policy.outputs(whole), whole)
    for size in (1, 5):
        losses = [loss(policy.outputs(part), whole) for part in whole.parts(size)]
        parts = [value for value in losses if value is not None]
        assert bool(parts) == (expected is not None), "only some of the parts have a loss"
        if expected is not None:
            torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-7)


class _PullToZero(Strategy):
    """A stateless companion: weight decay as a penalty."""

    name = "pull_to_zero"

    def penalty(self, policy: object) -> Tensor:
        parameters = policy.trainable().values()  # type: ignore[attr-defined]
        return 0.01 * torch.stack([(p**2).sum() for p in parameters]).sum()


def _bytes(run: Run) -> int:
    return sum(value.nbytes for value in run.strategies.state_dict().values())


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_resume,
    check_learning,
    check_zero_coefficients,
    check_composition,
    check_state,
    check_bounds,
    check_acting_weights,
    check_parameter_groups,
    check_parts,
)
