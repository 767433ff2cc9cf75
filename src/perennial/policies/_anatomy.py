"""What a network is made of, and what follows from it: parameters and arithmetic; `_activations` has the memory.

An `Anatomy` is read from a config alone, so everything here is known before a weight is loaded. The counts follow the
code that runs: transformers' blocks with SDPA attention, and PEFT's adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from perennial.policies._groups import GROUPS


@dataclass(frozen=True)
class Visit:
    """How a row of a batch passes through a part.

    Attributes:
        positions: of which outputs are computed.
        keys: positions that each of them attends to, in blocks.
        added: positions whose keys and values are computed, where they are not `positions`.
        times: how often this happens for one decision.
        unread: positions of which outputs are computed besides, though nothing reads them.
    """

    positions: int
    keys: int = 0
    added: int | None = None
    times: int = 1
    unread: int = 0

    @property
    def new(self) -> int:
        """Positions whose keys and values are computed."""
        return self.positions if self.added is None else self.added


@dataclass(frozen=True)
class Layer:
    """One linear layer; `activated` if GELU or SiLU follows, `frozen` if without adapter and passing no gradient on."""

    group: str
    into: int
    out: int
    acting: Visit
    learning: Visit
    bias: bool = True
    activated: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Blocks:
    """A stack of equal transformer blocks.

    Attributes:
        head_width: numbers of a head; `heads` and `key_value_heads` have as many each.
        gated: RMS norms, a gated perceptron and no bias, as in Llama and Gemma; else layer norms and GELU, as in ViT.
        scaled: learned scales after attention and perceptron, as in DINOv2.
        gemma: RMS norms scale in float32.
        attends_once: attention keeps a mask; gradient checkpointing runs only the perceptron again.
        keys_from: width of what keys and values are made of where that is not the block's own input: what was cached.
        recomputed: gradient checkpointing reaches these blocks at all.
        normed: a norm follows the last block.
        acting: the passes of one decision.
        learning: the passes of one row of an update.
    """

    group: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    mlp_width: int
    acting: tuple[Visit, ...]
    learning: tuple[Visit, ...]
    gated: bool = True
    scaled: bool = False
    gemma: bool = False
    attends_once: bool = False
    keys_from: int | None = None
    recomputed: bool = True
    normed: bool = False

    @property
    def query_width(self) -> int:
        """Numbers of a position's query."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Numbers of a position's key, and of its value."""
        return self.key_value_heads * self.head_width

    def linears(self) -> Iterator[tuple[int, int, bool]]:
        """Widths of the linear layers of one block; True for those that run where keys are added."""
        yield self.width, self.query_width, False
        yield self.keys_from or self.width, self.key_width, True
        yield self.keys_from or self.width, self.key_width, True
        yield self.query_width, self.width, False
        for _ in range(2 if self.gated else 1):
            yield self.width, self.mlp_width, False
        yield self.mlp_width, self.width, False


@dataclass(frozen=True)
class Anatomy:
    """A network.

    Attributes:
        parts: where the arithmetic is, in the order of the forward pass.
        other: parameters outside of `parts`, such as embeddings, by group.
        steps: environment steps that one decision is good for.
        dtype: that the checkpoint asks for.
        state_dim, action_dim: numbers of a state that it reads, and of an action; None where any number will do.
    """

    parts: tuple[Layer | Blocks, ...]
    other: Mapping[str, int]
    steps: int
    dtype: str = "float32"
    state_dim: int | None = None
    action_dim: int | None = None


@dataclass(frozen=True)
class Learning:
    """What of a network learns, and how.

    Attributes:
        rank: of the adapter; None where the base weights learn.
        rank_by_group: where it differs.
        bytes: of one base weight and of one activation: 4 or 2.
        recompute: gradient checkpointing.
        groups: that learn; the others are frozen.
    """

    rank: int | None
    rank_by_group: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 4
    recompute: bool = False
    groups: tuple[str, ...] = GROUPS

    def rank_of(self, group: str) -> int:
        """The adapter's rank in a group, 0 without adapter."""
        return 0 if self.rank is None else self.rank_by_group.get(group, self.rank)


def parameters(anatomy: Anatomy, groups: Collection[str] = GROUPS) -> int:
    """Numbers in the base weights of `groups`."""
    other = sum(anatomy.other.get(group, 0) for group in groups)
    return other + sum(weights(part) for part in anatomy.parts if part.group in groups)


def weights(part: Layer | Blocks) -> int:
    """Numbers in the base weights of a part."""
    if isinstance(part, Layer):
        return part.out * (part.into + part.bias)
    linear = sum(out * (into + (not part.gated)) for into, out, _ in part.linears())
    norms = part.width * (2 if part.gated else 4)
    return part.layers * (linear + norms + (2 * part.width if part.scaled else 0))


def adapter_parameters(anatomy: Anatomy, learning: Learning, groups: Collection[str] = GROUPS) -> int:
    """Numbers in the adapter of `groups`: rank x (in + out) for every linear layer."""
    total = 0
    for part in anatomy.parts:
        rank = learning.rank_of(part.group) if part.group in groups else 0
        if isinstance(part, Layer):
            total += 0 if part.frozen else rank * (part.into + part.out)
        else:
            total += rank * part.layers * sum(into + out for into, out, _ in part.linears())
    return total


def arithmetic(part: Layer | Blocks, visit: Visit) -> float:
    """Floating-point operations of the matrix products of one row in one visit: two for each product and sum."""
    return _linear(part, visit) + _attention(part, visit)


def _linear(part: Layer | Blocks, visit: Visit) -> float:
    return 2.0 * sum(into * out * positions for into, out, positions in _products(part, visit))


def _adapted(part: Layer | Blocks, visit: Visit, learning: Learning) -> float:
    if isinstance(part, Layer) and part.frozen:
        return 0.0
    rank = learning.rank_of(part.group)
    return 2.0 * rank * sum((into + out) * positions for into, out, positions in _products(part, visit))


def _products(part: Layer | Blocks, visit: Visit) -> Iterator[tuple[int, int, int]]:
    """Widths of every linear layer and the positions at which it is computed."""
    if isinstance(part, Layer):
        yield part.into, part.out, visit.positions
        return
    for into, out, added in part.linears():
        yield into, out, part.layers * (visit.new if added else visit.positions)


def _attention(part: Layer | Blocks, visit: Visit) -> float:
    if isinstance(part, Layer):
        return 0.0
    return 4.0 * part.layers * visit.positions * visit.keys * part.query_width


def cache_read(part: Layer | Blocks, visit: Visit) -> int:
    """Numbers of earlier positions' keys and values that one row reads in one visit."""
    if isinstance(part, Layer):
        return 0
    if part.keys_from:
        return 2 * part.layers * part.keys_from * visit.new
    return 2 * part.layers * part.key_width * max(0, visit.keys - visit.new)


def visits(part: Layer | Blocks, acting: bool) -> tuple[Visit, ...]:
    """The passes of one row through a part."""
    chosen = part.acting if acting else part.learning
    return (chosen,) if isinstance(chosen, Visit) else chosen


def acting_operations(anatomy: Anatomy) -> float:
    """Floating-point operations of one decision."""
    return sum(v.times * arithmetic(part, v) for part in anatomy.parts for v in visits(part, True))


def update_operations(anatomy: Anatomy, learning: Learning, hardware: bool = True) -> float:
    """Floating-point operations of one row's forward and backward pass.

    The backward pass takes as many as the forward pass for the gradients of what went into a product, and as many again
    where both factors have one: in attention, in adapters, and in layers whose weights learn. It ends at the first part
    that learns.

    Args:
        anatomy: of the network.
        learning: what of it learns.
        hardware: with what gradient checkpointing computes again, as the hardware sees it; without, as a model FLOP
            utilisation counts.
    """
    total = 0.0
    reached = False
    for part in anatomy.parts:
        learns = part.group in learning.groups
        reached = reached or learns
        for visit in visits(part, False):
            back = reached and not (isinstance(part, Layer) and part.frozen)
            forward = Visit(visit.unread, visit.unread) if visit.unread else visit
            once = arithmetic(part, forward) + _adapted(part, forward, learning)
            if back:
                once += (2.0 if learns and learning.rank is None else 1.0) * _linear(part, visit)
                once += 2.0 * _attention(part, visit) + (1.0 + learns) * _adapted(part, visit, learning)
            if hardware and back and learning.recompute and isinstance(part, Blocks) and part.recomputed:
                once += _perceptron_arithmetic(part, visit) if part.attends_once else arithmetic(part, visit)
            total += visit.times * once
    return total


def _perceptron_arithmetic(part: Blocks, visit: Visit) -> float:
    return 2.0 * (3 if part.gated else 2) * part.width * part.mlp_width * visit.positions * part.layers
