"""Memory and time of a run from sizes alone; every function is pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from perennial.planning.gpus import GPU
from perennial.policies import _activations, _anatomy
from perennial.policies._anatomy import Anatomy, Learning
from perennial.policies._groups import GROUPS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MICRO_BATCH = "--recipe.*.optimizer.micro_batch"
"""A switch of every stage; see `perennial.planning.reading.option`."""


@dataclass(frozen=True)
class Stage:
    """The updates of a recipe's stage.

    Attributes:
        rows: of a micro-batch.
        step: rows of an optimiser step, where there may be fewer.
        learns: groups of parameters.
        open: the rows are the most that may be taken; as many are as fit.
    """

    rows: int = 256
    step: float = math.inf
    learns: tuple[str, ...] = GROUPS
    open: bool = False

    @property
    def taken(self) -> int:
        """Rows in one forward and backward pass."""
        return int(min(self.rows, self.step))


@dataclass(frozen=True)
class Use:
    """How a network is used.

    Attributes:
        anatomy: of the network.
        rank: of the adapter, None where every parameter learns; `rank_by_group` where it differs.
        dtype: of the base weights.
        recompute: gradient checkpointing.
        stages: of the recipe.
        slots: rows in one forward pass of acting.
        actors: processes that act on the device; each holds weights of its own beside the learner's.
        shared: the actors share one copy of the weights (on the CPU).
        lent: the one actor has the learner's own weights and no copy; `lendable` where that could be so.
    """

    anatomy: Anatomy
    rank: int | None
    rank_by_group: tuple[tuple[str, int], ...] = ()
    dtype: str = "float32"
    recompute: bool = False
    stages: tuple[Stage, ...] = (Stage(),)
    slots: int = 16
    actors: int = 1
    shared: bool = False
    lent: bool = False
    lendable: bool = False

    def learning(self, stage: Stage) -> Learning:
        """What of the network learns in `stage`."""
        return Learning(self.rank, dict(self.rank_by_group), BYTES[self.dtype], self.recompute, stage.learns)

    @property
    def adapter(self) -> int:
        """Numbers in the adapter."""
        return _anatomy.adapter_parameters(self.anatomy, self.learning(Stage()))

    @property
    def rows(self) -> int:
        """The most rows in one forward and backward pass."""
        return max(stage.taken for stage in self.stages)

    def capped(self, rows: int, only_open: bool = False) -> Use:
        """The same with at most `rows` rows in one forward and backward pass, in all stages or in open ones."""
        stages = (replace(s, rows=min(s.rows, rows)) if s.open or not only_open else s for s in self.stages)
        return replace(self, stages=tuple(stages))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: of the learner's base.
        adapter: float32, 0 without one.
        moments: of AdamW, two numbers for each that learns.
        actors: the weights of those who act.
        broadcast: the merged weights on their way to the actors.
        acting: activations of those who act.
        gradients: one number for each that learns.
        kept: activations of one micro-batch for the backward pass.
        passing: what the backward pass holds for a moment.
    """

    weights: float
    adapter: float
    moments: float
    actors: float
    broadcast: float
    acting: float
    gradients: float
    kept: float
    passing: float

    @property
    def always(self) -> float:
        """What lies there all the time."""
        return self.weights + self.adapter + self.moments + self.actors

    @property
    def update(self) -> float:
        """What an update adds to that."""
        return self.gradients + self.kept + self.passing

    @property
    def peak(self) -> float:
        """The most at one time: handing over weights, acting and learning take turns."""
        return self.always + max(self.broadcast, self.acting, self.update)


def memory(use: Use) -> Memory:
    """The memory that `use` takes, in the stage that takes the most."""
    return max((_memory(use, stage) for stage in use.stages), key=lambda found: found.peak)


def _memory(use: Use, stage: Stage) -> Memory:
    size, learning = BYTES[use.dtype], use.learning(stage)
    base = _anatomy.parameters(use.anatomy) * size
    if use.rank is None:
        learned = _anatomy.parameters(use.anatomy, stage.learns) * size
    else:
        learned = _anatomy.adapter_parameters(use.anatomy, learning, stage.learns) * 4
    return Memory(
        weights=base,
        adapter=use.adapter * 4,
        moments=2 * learned,
        actors=0 if use.lent else base * (1 if use.shared else use.actors),
        broadcast=0 if use.lent else base,
        acting=use.actors * use.slots * _activations.acting_bytes(use.anatomy, size),
        gradients=learned,
        kept=stage.taken * _activations.kept(use.anatomy, learning),
        passing=stage.taken * _activations.passing(use.anatomy, learning),
    )


def settled(use: Use, room: float) -> tuple[tuple[str, ...], Use] | None:
    """The `switches` that make `use` fit, and how it is used then; None where none helps."""
    tight = fitted(use, room)
    chosen = switches(tight, room)
    if chosen is None:
        return None
    lighter = apply(tight, chosen)
    pairs = zip(use.stages, lighter.stages, strict=True)
    loose = replace(lighter, stages=tuple(before if before.open else now for before, now in pairs))
    return chosen, fitted(loose, room)


def fitted(use: Use, room: float) -> Use:
    """`use` with open stages at as many rows, halved from what they have, as fit into `room` bytes; at least one."""
    rows = max((stage.rows for stage in use.stages if stage.open), default=1)
    while rows > 1 and memory(use.capped(rows, only_open=True)).peak > room:
        rows //= 2
    return use.capped(rows, only_open=True)


def remedies(use: Use) -> Iterator[tuple[str, Use]]:
    """Switches that save memory, cheapest first, each on top of those before it: what to write, and the use."""
    if use.actors > 1 and not use.shared:
        use = replace(use, actors=1)
        yield "--workers.backend inline", use
    if use.lendable and not use.lent:
        use = replace(use, actors=1, lent=True)
        yield "--workers.backend shared", use
    if use.dtype == "float32":
        use = replace(use, dtype="bfloat16")
        yield "--policy.dtype bfloat16", use
    while use.rows > 8:
        use = use.capped(use.rows // 2)
        yield f"{MICRO_BATCH} {use.rows}", use
    if not use.recompute:
        use = replace(use, recompute=True)
        yield "--policy.checkpointing true", use
    while use.rows > 1:
        use = use.capped(use.rows // 2)
        yield f"{MICRO_BATCH} {use.rows}", use
    while use.slots > 1:
        use = replace(use, slots=use.slots // 2)
        yield f"--workers.slots {use.slots}", use


def switches(use: Use, room: float) -> tuple[str, ...] | None:
    """What to turn so that `use` fits into `room` bytes; nothing where it does already, None where no switch helps."""
    if memory(use).peak <= room:
        return ()
    needed: dict[str, str] = {}
    for switch, lighter in remedies(use):
        needed.pop(switch.split()[0], None)  # the last switch turned comes last
        needed[switch.split()[0]] = switch
        if memory(lighter).peak <= room:
            return tuple(needed.values())
    return None


def apply(use: Use, chosen: tuple[str, ...]) -> Use:
    """`use` with the last of `switches` and all before it turned."""
    if not chosen:
        return use
    return next(lighter for switch, lighter in remedies(use) if switch == chosen[-1])


@dataclass(frozen=True)
class Work:
    """How much a run does.

    Attributes:
        decisions: made while learning; `evaluated`: while evaluating.
        rows: that the updates of each stage pass forward and backward.
        env_steps: of all episodes.
    """

    decisions: float
    evaluated: float
    rows: tuple[float, ...]
    env_steps: float


@dataclass(frozen=True)
class Time:
    """Seconds, one after another."""

    acting: float
    simulating: float
    learning: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.acting + self.simulating + self.learning


def decision_seconds(use: Use, gpu: GPU, rows: int, share: float) -> float:
    """Seconds of one decision of `rows` rows at once.

    Every part of every pass takes what its matrix products take at `share` of the card's rate, or what reading its
    weights and the keys and values of earlier positions takes at its full bandwidth, whichever is longer.
    """
    size, rate = BYTES[use.dtype], share * gpu.matrix_rate(use.dtype)
    seconds = 0.0
    for part in use.anatomy.parts:
        for visit in _anatomy.visits(part, acting=True):
            once = rows * _anatomy.arithmetic(part, visit) / rate
            read = size * (_anatomy.weights(part) + rows * _anatomy.cache_read(part, visit)) / gpu.bandwidth
            seconds += visit.times * max(once, read)
    return seconds


def time(use: Use, gpu: GPU, work: Work, share: float, steps_per_second: float) -> Time:
    """Seconds that a run takes at the assumed rates.

    Args:
        use: of the network.
        gpu: on which it is used.
        work: how much there is to do.
        share: of the card's matrix rate that acting and learning achieve.
        steps_per_second: environment steps of one actor.
    """
    rate = share * gpu.matrix_rate(use.dtype)
    each = decision_seconds(use, gpu, use.slots, share) / use.slots
    learning = (
        rows * _anatomy.update_operations(use.anatomy, use.learning(stage))
        for rows, stage in zip(work.rows, use.stages, strict=True)
    )
    return Time(
        acting=(work.decisions + work.evaluated) * each,
        simulating=work.env_steps / (steps_per_second * use.actors),
        learning=sum(learning) / rate,
    )
