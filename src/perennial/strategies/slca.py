"""SLCA's slow learner, by which general knowledge learns slowly and actions fast, and its classifier alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from perennial.errors import PerennialError
from perennial.policies.base import Policy
from perennial.policies.lora import base_name
from perennial.randomness import stream
from perennial.rollout.trajectory import to_batch
from perennial.strategies._alignment import Gaussians, align, measure
from perennial.strategies._weights import nested, prefixed
from perennial.strategies.base import Collect, ParameterGroup, Strategy
from perennial.suites.base import Task


@dataclass
class SLCA(Strategy):
    """A learning rate for each group of parameters, as a multiple of the recipe's (Zhang et al., arXiv 2303.05118).

    The defaults are the form that the code of arXiv 2603.11653 has: learning rates only, its 4e-6 and 4e-5 at a
    recipe's 2e-5. With `alignment_steps` the second half of SLCA follows every task but the first: the classifier alone
    learns to tell the bins of all tasks apart, on features drawn from Gaussians that were remembered of the successful
    episodes of each task.

    SLCA's classes belong to one task each; here they are the bins of actions, which tasks share. So there is a Gaussian
    for each bin of each task, with one covariance for all bins of a task, many of which are seen only a few times, and
    bins are drawn as often as they were chosen, so that the classifier keeps its prior. Differs from their code also in
    leaving out the weight decay, which would shrink an adapter, and the shrinking of earlier means by up to a tenth.

    Attributes:
        vision, language, action: multiples of the recipe's learning rate, at least 0.
        alignment_steps: gradient steps of the alignment; 0 leaves it out. Theirs are five passes over 256 features of
            each class.
        alignment_size: features in a step.
        alignment_rate: learning rate at the first step of the alignment.
        episodes: played after every task for its Gaussians. A task without success is not remembered.
    """

    name: ClassVar[str] = "slca"
    vision: float = 0.2
    language: float = 0.2
    action: float = 2.0
    alignment_steps: int = 0
    alignment_size: int = 256
    alignment_rate: float = 0.01
    episodes: int = 32
    known: dict[str, Gaussians] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        scales = (self.vision, self.language, self.action)
        if min(scales) < 0:
            raise PerennialError(f"slca's learning rates are scaled by {scales}; each must be at least 0.")
        if self.alignment_steps < 0 or min(self.alignment_size, self.alignment_rate, self.episodes) <= 0:
            raise PerennialError(
                f"slca aligns in {self.alignment_steps} steps of {self.alignment_size} features at the rate "
                f"{self.alignment_rate} from {self.episodes} episodes; steps must be at least 0, the others above 0."
            )

    def requires(self) -> frozenset[str]:
        """What the alignment reads and trains."""
        return frozenset({"features"} if self.alignment_steps else ())

    def unjoined(self) -> str | None:
        """Rates act as ever; an alignment is to earlier tasks."""
        return "it aligns to earlier tasks, of which there are none" if self.alignment_steps else None

    def parameter_groups(self, policy: Policy) -> Sequence[ParameterGroup]:
        """One group each for vision, language and action."""
        group_of = {name: group for group, names in policy.groups.items() for name in names}
        parameters: dict[str, dict[str, nn.Parameter]] = {group: {} for group in ("vision", "language", "action")}
        for name, parameter in policy.trainable().items():
            parameters[group_of[base_name(name)]][name] = parameter
        return [ParameterGroup(members, getattr(self, group)) for group, members in parameters.items()]

    def after_task(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Align the classifier to this task and those before it."""
        earlier = {name: known for name, known in self.known.items() if name != task.name}
        if self.alignment_steps and earlier:
            known = earlier | self._measured(task, policy, collect)
            rng = stream(0, self.name, task.name)
            align(policy, known, rng, self.alignment_steps, self.alignment_size, self.alignment_rate)

    def remember(self, task: Task, policy: Policy, collect: Collect) -> None:
        """Keep the Gaussians of the weights that are carried on."""
        if self.alignment_steps:
            self.known.pop(task.name, None)
            self.known |= self._measured(task, policy, collect)

    def _measured(self, task: Task, policy: Policy, collect: Collect) -> dict[str, Gaussians]:
        """The Gaussians of fresh successful episodes by the task's name, if there is any success."""
        successes = [played for played in collect(self.episodes) if played.success]
        return {task.name: measure(policy, to_batch(successes, policy.token_steps))} if successes else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The Gaussians of every task."""
        states = [prefixed(task, known.tensors()) for task, known in self.known.items()]
        return {key: value for state in states for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` gave."""
        self.known = {task: Gaussians(**tensors) for task, tensors in nested(state, policy.device).items()}
