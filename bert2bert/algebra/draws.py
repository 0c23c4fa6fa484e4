"""The random numbers of a plan. Each depends only on the seed, the tensor's name, what it is for and its place in the
whole tensor, so that a shard draws its rows alone, and the same ones.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra.maps import Index
from bert2bert.algebra.plan import Fill, Noise, TensorPlan

_CHUNK = 1 << 14  # numbers made at a time: they stay in a core's cache


def normal_fill(plan: TensorPlan, fill: Fill) -> NDArray[np.float64]:
    """Values where no term writes: normal numbers of the fill's deviation, repeated after its period."""
    rows = np.arange(plan.row, plan.row + plan.shape[0])
    if fill.period:
        return fill.std * _normal(plan, "fill", 0, fill.period)[rows % fill.period]
    drawn = _normal(plan, "fill", plan.row, plan.row + plan.shape[0])
    return np.multiply(drawn, fill.std, out=drawn)


def pair_noise(plan: TensorPlan, noise: Noise) -> NDArray[np.float64]:
    """Each copy's own noise less its next sibling's: over the copies of a feature it sums to zero. Features without
    copies have none, and nothing is drawn for them where they are rows or the last dim."""
    result, mine = np.zeros(plan.shape), np.arange(plan.row, plan.row + plan.shape[0])
    if noise.dim:
        copied = np.flatnonzero(noise.sibling != np.arange(plan.shape[noise.dim]))
        some = noise.dim == len(plan.shape) - 1 and len(copied) < plan.shape[noise.dim]
        kept = (..., copied) if some else (...,)
        theirs = np.searchsorted(copied, noise.sibling[copied]) if some else noise.sibling
        step = max(1, 4 * _CHUNK // max(1, _width(plan)))
        for at in range(0, len(mine) if len(copied) else 0, step):
            block = result[at : at + step]
            own = _normal(plan, "noise", plan.row + at, plan.row + at + len(block), copied if some else None)
            block[kept] = own - own.take(theirs, axis=noise.dim)
    else:
        copied = np.flatnonzero(noise.sibling[mine] != mine)
        pairs = mine[copied], noise.sibling[mine[copied]]
        drawn, place = _drawn_rows(plan, np.union1d(*pairs)) if len(copied) else (result, pairs[0])
        own, other = (drawn[np.searchsorted(place, rows)] for rows in pairs)
        result[copied] = own - other
    result *= noise.std / np.sqrt(2.0)
    return result


def _drawn_rows(plan: TensorPlan, rows: Index) -> tuple[NDArray[np.float64], Index]:
    """The noise of rows, given in order, and these."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return np.concatenate([_normal(plan, "noise", int(run[0]), int(run[-1]) + 1) for run in runs]), rows


def drawn(plan: TensorPlan) -> int:
    """How many numbers are drawn for a tensor, each once, or twice where a block draws its rows' siblings, too."""
    count = 0
    if plan.fill is not None and plan.fill.kind == "normal":
        count += plan.shape[0] * _width(plan)
    if plan.noise is not None:
        size, dim = plan.shape[plan.noise.dim], plan.noise.dim
        copied = int((plan.noise.sibling != np.arange(size)).sum())
        share = 2 * copied if dim == 0 else copied if dim == len(plan.shape) - 1 else size * bool(copied)
        count += plan.shape[0] * _width(plan) // size * share
    return count


def _width(plan: TensorPlan) -> int:
    return int(np.prod(plan.shape[1:], dtype=np.int64))


def _normal(plan: TensorPlan, purpose: str, first: int, end: int, columns: Index | None = None) -> NDArray[np.float64]:
    """Standard normal numbers of rows [first, end): they depend only on (seed, name, purpose, place in the tensor).
    columns: only those places of the last dim."""
    start, count = first * _width(plan), (end - first) * _width(plan)
    key = hashlib.blake2b(f"{plan.seed}/{purpose}/{plan.name}".encode(), digest_size=16).digest()
    # Philox makes four 64-bit words per counter value: start at the block that holds word `start`.
    bits = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64), counter=[start // 4, 0, 0, 0])
    bits.random_raw(start % 4)
    if columns is not None:
        words = bits.random_raw(count).reshape(-1, plan.shape[-1])[:, columns]
        return _box_muller(words.ravel()).reshape(end - first, *plan.shape[1:-1], len(columns))
    out = np.empty(count)
    for at in range(0, count, _CHUNK):
        out[at : at + _CHUNK] = _box_muller(bits.random_raw(min(_CHUNK, count - at)))
    return out.reshape((end - first, *plan.shape[1:]))


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A normal number of each word: its upper half makes the radius, its lower half the angle."""
    radius = (words >> np.uint64(32)).astype(np.float64)
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0**-32
    angle *= 2.0 * np.pi
    np.cos(angle, out=angle)
    radius *= angle
    return radius
