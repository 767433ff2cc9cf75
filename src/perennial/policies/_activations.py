"""The memory of one pass through a network: what the update keeps for its backward pass, and what acting holds.

Adapters' float32 layers keep a float32 copy of their input beside bfloat16 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from perennial.policies._anatomy import Anatomy, Blocks, Layer, Learning, Visit, cache_read, visits


@dataclass(frozen=True)
class Share:
    """What learns of one part, through which a gradient passes.

    Attributes:
        bytes: of one base weight and of one activation.
        recompute: gradient checkpointing.
        base: the base weights learn.
        rank: of the adapter that learns, 0 without.
    """

    bytes: int
    recompute: bool
    base: bool
    rank: int

    @property
    def learns(self) -> bool:
        """Whether anything does: layers then keep what goes into them."""
        return self.base or self.rank > 0

    @property
    def copied(self) -> bool:
        """Whether adapters keep float32 copies of what goes into them."""
        return self.rank > 0 and self.bytes < 4


def kept(anatomy: Anatomy, learning: Learning) -> int:
    """Bytes that the update keeps of one row for its backward pass, which ends at the first part that learns."""
    return sum(_kept(part, _share(learning, part.group)) for part in _reached(anatomy, learning))


def _share(learning: Learning, group: str) -> Share:
    """What learns of a part of `group`."""
    learns = group in learning.groups
    rank = learning.rank_of(group) if learns else 0
    return Share(learning.bytes, learning.recompute, base=learns and learning.rank is None, rank=rank)


def _reached(anatomy: Anatomy, learning: Learning) -> tuple[Layer | Blocks, ...]:
    """The parts through which the gradient passes."""
    first = next((i for i, part in enumerate(anatomy.parts) if part.group in learning.groups), len(anatomy.parts))
    return anatomy.parts[first:]


def _kept(part: Layer | Blocks, share: Share) -> int:
    if isinstance(part, Layer):
        return part.learning.times * _kept_by_layer(part, part.learning, share)
    return sum(visit.times * _kept_by_blocks(part, visit, share) for visit in part.learning)


def _kept_by_layer(layer: Layer, visit: Visit, share: Share) -> int:
    if layer.frozen:
        return share.base * share.bytes * layer.into * visit.positions
    into = (4 if share.copied else share.bytes) * layer.into if share.learns else 0
    return visit.positions * (into + 4 * share.rank + (share.bytes * layer.out if layer.activated else 0))


def _kept_by_blocks(blocks: Blocks, visit: Visit, share: Share) -> int:
    norm = 0
    if blocks.normed:
        norm = ((8 if share.base else 4) if blocks.gated else share.bytes) * blocks.width * visit.positions
    if not (share.recompute and blocks.recomputed):
        return norm + blocks.layers * _kept_by_block(blocks, visit, share)
    inside = share.bytes * blocks.width * visit.positions
    if blocks.attends_once:
        inside += _kept_by_attention(blocks, visit, share)
    return norm + blocks.layers * inside


def _kept_by_block(blocks: Blocks, visit: Visit, share: Share) -> int:
    return _kept_by_attention(blocks, visit, share) + _kept_by_perceptron(blocks, visit, share)


def _kept_by_attention(blocks: Blocks, visit: Visit, share: Share) -> int:
    """Bytes kept of the norms and the attention of one block and one row."""
    size, width = share.bytes, blocks.width
    query, key = blocks.query_width, blocks.key_width
    here, new = visit.positions, visit.new
    read, made_of = (here, 2 * blocks.keys_from) if blocks.keys_from else (new, 0)
    normed = 4 if blocks.gated else size  # RMS norms compute in float32, layer norms keep what they are given
    total = normed * width * (read + here)
    if share.base and blocks.gated:
        total += (4 if blocks.gemma else size) * width * (read + here)
    if blocks.scaled and share.base:
        total += 2 * size * width * here
    if share.learns:
        copies = width * here + (made_of or 2 * width) * new
        total += 4 * copies if share.copied else size * (width * read + made_of * new)
    total += 4 * share.rank * (2 * here + 2 * new)
    if here:
        mask = here * visit.keys if blocks.attends_once else 0
        total += size * (2 * query * here + 2 * key * visit.keys + mask) + 4 * blocks.heads * here
        total += 4 * query * here if share.copied else 0
    else:
        total += 2 * size * key * new
    return total


def _kept_by_perceptron(blocks: Blocks, visit: Visit, share: Share) -> int:
    """Bytes kept of the perceptron of one block and one row."""
    size, fans = share.bytes, 2 if blocks.gated else 1
    into = down = 0
    if share.learns:
        into = 4 * fans * blocks.width if share.copied else size * blocks.width
        down = (4 if share.copied else size) * blocks.mlp_width
    middle = (3 if blocks.gated else 1) * size * blocks.mlp_width
    return visit.positions * (into + middle + down + 4 * share.rank * (fans + 1))


def passing(anatomy: Anatomy, learning: Learning) -> int:
    """Bytes of one row that an update holds at most beyond `kept`, of which the backward pass lets go part by part.

    They are the gradients within one block, and with gradient checkpointing the block that was run again; or, at the
    end of its forward pass, the rest of a block that is run for its keys and values alone.
    """
    most = so_far = 0
    for part in _reached(anatomy, learning):
        share = _share(learning, part.group)
        so_far += _kept(part, share)
        if isinstance(part, Blocks):
            most = max(most, *(so_far + _moment(part, visit, share) for visit in visits(part, False)))
    return max(0, most - so_far)


def _moment(blocks: Blocks, visit: Visit, share: Share) -> int:
    size = share.bytes
    if visit.unread:
        whole = Visit(visit.unread, visit.unread)
        return _kept_by_blocks(blocks, whole, share) - _kept_by_blocks(blocks, visit, share)
    gradients = visit.positions * (2 * size + (8 if share.copied else size)) * blocks.mlp_width
    if not (share.recompute and blocks.recomputed):
        return gradients
    if blocks.attends_once:
        return gradients + _kept_by_perceptron(blocks, visit, share)
    return gradients + _kept_by_block(blocks, visit, share)


def acting_bytes(anatomy: Anatomy, size: int) -> int:
    """Bytes of one row while acting: a block's activations, and what is cached for later tokens.

    Args:
        anatomy: of the network.
        size: bytes of one activation.
    """
    most = cached = 0
    for part in anatomy.parts:
        if isinstance(part, Blocks):
            for visit in visits(part, True):
                width = 3 * part.width + (3 if part.gated else 2) * part.mlp_width
                most = max(most, size * visit.positions * width)
            if any(cache_read(part, visit) for visit in part.acting):
                cached += 2 * size * part.layers * part.key_width * max(visit.keys for visit in part.acting)
    return most + cached
