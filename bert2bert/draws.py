"""The random numbers of a plan. Each depends only on the seed, the tensor's name, what it is for and its place in the
whole tensor, so that a shard draws its rows alone, and the same ones.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from bert2bert.plan import Fill, Noise, TensorPlan


def normal_fill(plan: TensorPlan, fill: Fill) -> NDArray[np.float64]:
    """What stands where no term speaks: normal numbers of the fill's deviation, repeated after its period."""
    rows = np.arange(plan.row, plan.row + plan.shape[0])
    if fill.period:
        return fill.std * _normal(plan, "fill", 0, fill.period)[rows % fill.period]
    return fill.std * _normal(plan, "fill", plan.row, plan.row + plan.shape[0])


def pair_noise(plan: TensorPlan, noise: Noise) -> NDArray[np.float64]:
    """Each copy's own noise less its next sibling's: over the copies of a feature it sums to zero."""
    if not plan.shape[0]:
        return np.zeros(plan.shape)
    mine = np.arange(plan.row, plan.row + plan.shape[0])
    if noise.dim:
        own = _normal(plan, "noise", plan.row, plan.row + plan.shape[0])
        theirs = own.take(noise.sibling, axis=noise.dim)
    else:
        next_rows = noise.sibling[mine]
        low, high = int(min(mine[0], next_rows.min())), int(max(mine[-1], next_rows.max())) + 1
        drawn = _normal(plan, "noise", low, high)
        own, theirs = drawn[mine - low], drawn[next_rows - low]
    result: NDArray[np.float64] = noise.std / np.sqrt(2.0) * (own - theirs)
    return result


def _normal(plan: TensorPlan, purpose: str, first: int, end: int) -> NDArray[np.float64]:
    """Standard normal numbers of rows [first, end): they depend only on (seed, name, purpose, place in the tensor)."""
    width = int(np.prod(plan.shape[1:], dtype=np.int64))
    start, count = first * width, (end - first) * width
    key = hashlib.blake2b(f"{plan.seed}/{purpose}/{plan.name}".encode(), digest_size=16).digest()
    # Philox makes four 64-bit words per counter value: start at the block that holds word `start`.
    bits = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64), counter=[start // 4, 0, 0, 0])
    words = bits.random_raw(count + start % 4)[start % 4 :]
    u = ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32
    v = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    normal: NDArray[np.float64] = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
    return normal.reshape((end - first, *plan.shape[1:]))
