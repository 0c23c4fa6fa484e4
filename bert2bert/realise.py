"""Turn a tensor plan into numbers: the only arithmetic on weights in this project.

Works row block by row block: a narrowed plan reads only the source rows it names and gives, bit for bit, the same rows
as the whole plan. Arithmetic is done in the dtype asked for (float32 by default).

Refuses: an unknown state name (KeyError of `states.STATES`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert2bert.plan import Dim, TensorPlan, Term
from bert2bert.states import STATES, State

Read = Callable[[str, str, int, int], Tensor]
"""(source tensor, state, first row, one past the last row) -> those rows of dim 0."""


def realise(plan: TensorPlan, state: str, read: Read, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor (or the rows) that a plan describes, for one state: 'fp32', 'exp_avg' or 'exp_avg_sq'.

    read: gives rows of the source tensors in any floating dtype. Returns a new tensor of ``plan.shape``.
    """
    how = STATES[state]
    whole = len(plan.terms) == 1 and all(dim.full for dim in plan.terms[0].dims)
    out = _term(plan.terms[0], how, read, dtype) if whole else _background(plan, how, dtype)
    if not whole:
        for term in plan.terms:
            where = [np.nonzero(dim.index >= 0)[0] for dim in term.dims]
            if all(len(w) for w in where):
                spoken = Term(term.source, tuple(d[w] for d, w in zip(term.dims, where, strict=True)))
                _place(out, where, _term(spoken, how, read, dtype))
    if plan.noise is not None and not how.gradient:
        out += torch.from_numpy(_null_space_noise(plan)).to(dtype)
    if how.gradient:
        for d, mask in enumerate(plan.fresh):
            if mask is not None:
                out.index_fill_(d, torch.from_numpy(np.nonzero(mask)[0]), 0)
    return out


def _term(term: Term, how: State, read: Read, dtype: torch.dtype) -> Tensor:
    rows = term.dims[0].index
    if not rows.size:
        return torch.zeros([len(d.index) for d in term.dims], dtype=dtype)
    low = int(rows.min())
    x = read(term.source, how.name, low, int(rows.max()) + 1)
    copied = False
    for d, dim in enumerate(term.dims):
        index = dim.index - low if d == 0 else dim.index
        if len(index) != x.shape[d] or not np.array_equal(index, np.arange(len(index))):
            x, copied = x.index_select(d, torch.from_numpy(index)), True
    copied = copied or x.dtype != dtype
    x = x.to(dtype)
    for stage in range(max(len(_chain(dim, how)) for dim in term.dims)):
        for d, dim in enumerate(term.dims):
            chain = _chain(dim, how)
            if stage < len(chain):
                factor = torch.from_numpy(chain[stage] ** how.power).to(dtype)
                factor = factor.view([-1 if i == d else 1 for i in range(x.ndim)])
                x, copied = (x.mul_(factor) if copied else x * factor), True
    return x if copied else x.clone()


def _place(out: Tensor, where: list[NDArray[np.int64]], block: Tensor) -> None:
    """Write a block at the outer product of positions; positions in one run, the usual case, need no index tensors."""
    if all(w[-1] - w[0] + 1 == len(w) for w in where):
        out[tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)] = block
    else:
        out[torch.meshgrid(*[torch.from_numpy(w) for w in where], indexing="ij")] = block


def _chain(dim: Dim, how: State) -> tuple[NDArray[np.float64], ...]:
    return dim.grad if how.gradient else dim.param


def _background(plan: TensorPlan, how: State, dtype: torch.dtype) -> Tensor:
    if plan.fill is None or how.gradient or plan.fill.kind == "zeros":
        return torch.zeros(plan.shape, dtype=dtype)
    if plan.fill.kind == "ones":
        return torch.ones(plan.shape, dtype=dtype)
    return torch.from_numpy(plan.fill.std * _normal(plan, "fill")).to(dtype)


def _null_space_noise(plan: TensorPlan) -> NDArray[np.float64]:
    """N - N E L over the last dim, so that the noise seen through the copies of any input vanishes."""
    noise = plan.noise
    if noise is None:
        return np.zeros(plan.shape)
    n = noise.std * _normal(plan, "noise")
    order = np.argsort(noise.index, kind="stable")
    starts = np.nonzero(np.diff(noise.index[order], prepend=-1))[0]
    sums = np.add.reduceat(n[..., order], starts, axis=-1)
    result: NDArray[np.float64] = n - sums[..., noise.index] * noise.share
    return result


def _normal(plan: TensorPlan, purpose: str) -> NDArray[np.float64]:
    """Standard normal numbers that depend only on (seed, name, purpose, place in the whole tensor): rows are slices."""
    width = int(np.prod(plan.shape[1:], dtype=np.int64))
    start, count = plan.row * width, plan.shape[0] * width
    key = hashlib.blake2b(f"{plan.seed}/{purpose}/{plan.name}".encode(), digest_size=16).digest()
    # Philox makes four 64-bit words per counter value: start at the block that holds word `start`.
    bits = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64), counter=[start // 4, 0, 0, 0])
    words = bits.random_raw(count + start % 4)[start % 4 :]
    u = ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32
    v = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    normal: NDArray[np.float64] = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
    return normal.reshape(plan.shape)
