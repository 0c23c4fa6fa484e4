"""Where each parameter's elements lie in DeepSpeed's ZeRO partitions: interval arithmetic, no tensors, no files.

A ZeRO file holds no names inside its flat tensors: a parameter is found by arithmetic alone, so reader, writer and the
trainer's load guard share these two functions. Source: DeepSpeed 0.19.8, `stage_1_and_2.py` (groups flattened, aligned,
cut into equal partitions) and `stage3.py` (each parameter cut by itself, sub-groups of parameters flattened together).

Refuses nothing a user can cause: callers check their input first; impossible arguments raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NCCL_START_ALIGNMENT = 2  # stages 1 and 2: a group is padded to a multiple of this times the world size
NCCL_START_ALIGNMENTS = (2, 1, 4, 8, 16, 32, 64)  # of other DeepSpeeds, which a reader tries by the sizes it finds
SUB_GROUP_SIZE = 10**9  # DeepSpeed's default for stage 3, in elements of one rank


class Piece(NamedTuple):
    """Elements ``[start, stop)`` of flattened parameter ``param`` lie at ``[at, at + stop - start)`` of a rank's shard.

    ``param`` is the parameter's index in the sequence of numels given to the layout function.
    """

    param: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Zero12Layout:
    """One optimizer group of ZeRO stage 1 or 2. All figures are in elements.

    ``offsets[i]``: start of parameter i in the flat group; ``total``: end of the last parameter; ``padded``: length of
    the flat group over all ranks; ``partition``: length of one rank's shard; ``paddings[r]``: elements at the end of
    rank r's shard that belong to no parameter; ``gaps[i]``: alignment elements after parameter i (0 after the last);
    ``pieces[r]``: what rank r holds, in shard order.
    """

    numels: tuple[int, ...]
    world: int
    offsets: tuple[int, ...]
    gaps: tuple[int, ...]
    total: int
    padded: int
    partition: int
    paddings: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True)
class SubGroup:
    """One sub-group of ZeRO stage 3; ``params`` index the numels of the whole group. All figures are in elements.

    Every rank holds ``slices[k]`` elements of the k-th parameter at ``offsets[k]`` of a flat tensor of length
    ``numel``; the end of the last rank's slice may be padding (uninitialised in files that DeepSpeed wrote).
    """

    params: tuple[int, ...]
    slices: tuple[int, ...]
    offsets: tuple[int, ...]
    numel: int
    pieces: tuple[tuple[Piece, ...], ...]


def parameter_alignment(element_size: int, enabled: bool = True) -> int:
    """Elements to which DeepSpeed's ``parameter_alignment`` option (16 bytes) aligns; 1 when it is off.

    ``element_size``: bytes of one element of the model's own (low) precision.
    """
    return 16 // math.gcd(16, element_size) if enabled else 1


def _check(numels: Sequence[int], world: int) -> None:
    if world < 1 or any(n < 0 for n in numels):
        raise ValueError(f"impossible layout: world size {world}, numels {list(numels)}")


def zero12_layout(
    numels: Sequence[int], world: int, alignment: int = 1, nccl_start_alignment: int = NCCL_START_ALIGNMENT
) -> Zero12Layout:
    """Layout of one optimizer group under ZeRO stage 1 or 2.

    ``numels``: elements of each parameter in group order (those without elements are never partitioned: leave them
    out). ``alignment``: from `parameter_alignment`, in elements. ``nccl_start_alignment``: DeepSpeed's factor.
    """
    _check(numels, world)
    if alignment < 1 or nccl_start_alignment < 1:
        raise ValueError(f"impossible layout: alignments {alignment}, {nccl_start_alignment}")
    offsets: list[int] = []
    total = 0
    for n in numels:
        offsets.append(math.ceil(total / alignment) * alignment)
        total = offsets[-1] + n
    ends = [o + n for o, n in zip(offsets, numels, strict=True)]
    gaps = tuple(b - a for a, b in zip(ends, offsets[1:] + ends[-1:], strict=True)) if numels else ()
    quantum = nccl_start_alignment * world
    padded = math.ceil(total / quantum) * quantum
    partition = padded // world
    pieces = []
    for low in range(0, padded, partition) if partition else [0] * world:
        held = []
        for i, (begin, end) in enumerate(zip(offsets, ends, strict=True)):
            first, last = max(begin, low), min(end, low + partition)
            if first < last:
                held.append(Piece(i, first - begin, last - begin, first - low))
        pieces.append(tuple(held))
    paddings = tuple(min(max((r + 1) * partition - total, 0), partition) for r in range(world))
    return Zero12Layout(
        tuple(numels), world, tuple(offsets), gaps, total, padded, partition, paddings, tuple(pieces)
    )  # fmt: skip


def round_robin(count: int, world: int) -> list[int]:
    """Indices of ``count`` parameters in the order in which ``round_robin_gradients`` lays a group out."""
    return [i for first in range(world) for i in range(first, count, world)]


def zero3_layout(numels: Sequence[int], world: int, sub_group_size: int = SUB_GROUP_SIZE) -> list[SubGroup]:
    """Sub-groups of one optimizer group under ZeRO stage 3 (sub-groups never cross groups).

    ``numels``: elements of each parameter in group order; ``sub_group_size``: the ds_config's option, in elements of
    one rank.
    """
    _check(numels, world)
    slices = [-(-n // world) for n in numels]
    cuts = [0]
    if sum(slices) > sub_group_size:
        running = 0
        for i, c in enumerate(slices):
            running += c
            if running >= sub_group_size and i + 1 < len(slices):
                cuts.append(i + 1)
                running = 0
    bounds = zip(cuts, [*cuts[1:], len(numels)], strict=True)
    return [zero3_sub_group(numels, world, range(a, b)) for a, b in bounds if a < b]


def zero3_sub_group(numels: Sequence[int], world: int, params: Sequence[int]) -> SubGroup:
    """One sub-group that holds exactly ``params`` (indices into ``numels``): what a file's ``param_shapes`` names."""
    _check(numels, world)
    slices = tuple(-(-numels[i] // world) for i in params)
    offsets, numel = [], 0
    for c in slices:
        offsets.append(numel)
        numel += c
    pieces = tuple(
        tuple(
            Piece(i, r * c, min((r + 1) * c, numels[i]), at)
            for i, c, at in zip(params, slices, offsets, strict=True)
            if r * c < numels[i]
        )
        for r in range(world)
    )
    return SubGroup(tuple(params), slices, tuple(offsets), numel, pieces)


def row_blocks(shape: Sequence[int], elements: int = 1 << 22) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of dim 0, in blocks of about so many elements, a row at least; a scalar has one row."""
    rows, step = shape[0] if shape else 1, max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
