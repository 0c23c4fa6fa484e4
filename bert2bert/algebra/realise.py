"""Turn a tensor plan into numbers: the only arithmetic on weights in this project.

Works row block by row block: a narrowed plan reads only the source rows it names and gives, bit for bit, the same rows
as the whole plan (mixtures, which are matrix products, are computed in fixed blocks of rows for that). Arithmetic is
done in the dtype asked for (float32 by default).

Refuses: an unknown state name (KeyError of `states.STATES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert2bert.algebra.draws import normal_fill, pair_noise
from bert2bert.algebra.plan import Dim, GrowthPlan, TensorPlan, Term
from bert2bert.algebra.states import STATES, State

Read = Callable[[str, str, int, int], Tensor]
"""(source tensor, state, first row, one past the last row) -> those rows of dim 0."""

Where = list[NDArray[np.int64]]
_BLOCK = 256  # rows in which mixtures are computed


def values(plan: GrowthPlan, reads: Sequence[Read], dtype: torch.dtype = torch.float32) -> Read:
    """The grown checkpoint as a reader: rows of any target tensor and state.

    reads: one a checkpoint that the growth starts from (``plan.leaves``). A plan that rests on others computes, row by
    row, what those would have written.
    """
    below: list[Read] = []
    for before in plan.before:
        below.append(values(before, reads[: before.leaves], dtype))
        reads = reads[before.leaves :]
    sources = below or reads

    def rows(name: str, state: str, start: int, stop: int) -> Tensor:
        return realise(plan.tensors[name].narrow(start, stop), state, sources, dtype)

    return rows


def realise(plan: TensorPlan, state: str, read: Read | Sequence[Read], dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor (or the rows) that a plan describes, for one state: 'fp32', 'exp_avg' or 'exp_avg_sq'.

    read: gives rows of the source tensors in any floating dtype; one for each origin of the plan's terms. Returns a new
    tensor of ``plan.shape``.
    """
    reads = (read,) if callable(read) else read
    how = STATES[state]
    if plan.reset and how.gradient:
        return torch.zeros(plan.shape, dtype=dtype)
    if not plan.mixes or not plan.shape[0]:
        return _rows(plan, how, reads, dtype)
    whole, first = plan.whole or plan, plan.row - plan.row % _BLOCK
    blocks = [
        _rows(whole.narrow(start, min(start + _BLOCK, whole.shape[0])), how, reads, dtype)
        for start in range(first, plan.row + plan.shape[0], _BLOCK)
    ]
    return torch.cat(blocks)[plan.row - first :][: plan.shape[0]].clone()


def _rows(plan: TensorPlan, how: State, reads: Sequence[Read], dtype: torch.dtype) -> Tensor:
    alone = len(plan.terms) == 1 and not plan.mixes
    if alone and all(dim.full for dim in plan.terms[0].dims):
        out = _term(plan.terms[0], how, reads, dtype)
    else:
        out = _background(plan, how, dtype)
        bounded = how.power == 2 and (plan.sums or plan.mixes)
        placed = [(term, [np.nonzero(dim.index >= 0)[0] for dim in term.dims]) for term in plan.terms]
        placed = [
            (replace(term, dims=tuple(d[w] for d, w in zip(term.dims, where, strict=True))), where)
            for term, where in placed
        ]
        if plan.sums and plan.fill is not None:
            _spread(out, placed, lambda term: torch.zeros([len(d.index) for d in term.dims], dtype=dtype), False)
        out = _spread(out, placed, lambda term: _term(term, how, reads, dtype, absolute=bounded), plan.sums)
        if bounded:  # (sum of c g)^2 is at most (sum of |c|) (sum of |c| g^2), and that where copies agree
            out *= _spread(torch.zeros_like(out), placed, lambda term: _weights(term, dtype), plan.sums)
    if plan.noise is not None and not how.gradient:
        out += torch.from_numpy(pair_noise(plan, plan.noise)).to(dtype)
    if how.gradient:
        _zero(out, plan.fresh)
    return out


def _term(term: Term, how: State, reads: Sequence[Read], dtype: torch.dtype, absolute: bool = False) -> Tensor:
    """The block of the positions that a term writes. absolute: with |c| instead of c^2, to bound mixed squares."""
    term = replace(term, dims=tuple(map(_plain, term.dims)))
    old = [d for d, dim in enumerate(term.dims) if not dim.new]
    rows = term.dims[old[0]]
    if not all(len(dim.index) for dim in term.dims):
        return torch.zeros([len(d.index) for d in term.dims], dtype=dtype)
    low, high = (0, rows.mix.shape[1]) if rows.mix is not None else (int(rows.index.min()), int(rows.index.max()) + 1)
    if term.given is None:
        x = reads[term.origin](term.source, how.name, low, high)
    else:
        x = torch.from_numpy(np.zeros_like(term.given[low:high]) if how.gradient else term.given[low:high])
    read, x = x, x.to(dtype)
    for d, dim in enumerate(term.dims):
        if dim.new:
            x = x.unsqueeze(d)
        index = dim.index - low if d == old[0] else dim.index
        if dim.mix is not None:
            plain = dim.mix.shape[1]
            used = np.unique(index[index >= plain])
            matrix = np.abs(dim.mix[used - plain]) if absolute else dim.mix[used - plain]
            index = np.where(index < plain, index, plain + np.searchsorted(used, index))
            # a product's rounding depends on where its operands lie, and shards lie anywhere: copies are aligned alike
            x = x.clone(memory_format=torch.contiguous_format) if _shares(x, read) else x.contiguous()
            mixed = torch.tensordot(x, torch.from_numpy(matrix).to(x, copy=True), ([d], [1])).movedim(-1, d)
            x = torch.cat([x, mixed], d)
        run = int(np.argmin(np.append(index == np.arange(index[0], index[0] + len(index)), False)))  # most keep the old
        kept, more = x.narrow(d, int(index[0]), run), torch.from_numpy(index[run:])
        x = torch.cat([kept, x.index_select(d, more)], d) if run < len(index) else kept
    for d, dim in enumerate(term.dims):
        if (factor := dim.grad if how.gradient else dim.param) is not None:
            power = np.abs(factor) if absolute else factor**how.power
            shaped = torch.from_numpy(power).to(dtype).view([-1 if i == d else 1 for i in range(x.ndim)])
            x = x * shaped if _shares(x, read) else x.mul_(shaped)
    return x.clone() if _shares(x, read) else x


def _shares(x: Tensor, read: Tensor) -> bool:
    """Whether x lies in the memory of what was read, which is its reader's and not to be changed or returned."""
    return x.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()


def _plain(dim: Dim) -> Dim:
    """The dim without a mixture that none of its positions takes: a mixture reads the whole source."""
    unused = dim.mix is not None and not (dim.index >= dim.mix.shape[1]).any()
    return replace(dim, mix=None) if unused else dim


def _weights(term: Term, dtype: torch.dtype) -> Tensor:
    """Per entry of a term, the sum of the absolute coefficients of the gradients it mixes."""
    out = torch.ones([1] * len(term.dims), dtype=dtype)
    for d, dim in enumerate(term.dims):
        weight = np.ones(len(dim.index)) if dim.grad is None else np.abs(dim.grad)
        if dim.mix is not None:
            each = np.concatenate([np.ones(dim.mix.shape[1]), np.abs(dim.mix).sum(1)])
            weight = weight * each[dim.index]
        out = out * torch.from_numpy(weight).to(dtype).view([-1 if i == d else 1 for i in range(len(term.dims))])
    return out


def _spread(out: Tensor, placed: Sequence[tuple[Term, Where]], block: Callable[[Term], Tensor], sums: bool) -> Tensor:
    """Every term's block at its positions; sums: added pair by pair, so that the sum of 2^n equal copies is exact, and
    the same for all rows."""
    if sums and len(placed) > 1:
        half = len(placed) // 2
        first = _spread(out, placed[:half], block, sums)
        return first.add_(_spread(torch.zeros_like(out), placed[half:], block, sums))
    for term, where in placed:
        if all(len(w) for w in where):
            _place(out, where, block(term))
    return out


def _place(out: Tensor, where: Where, block: Tensor) -> None:
    """Write a block at the outer product of positions; positions in one run, the usual case, need no index tensors."""
    if all(w[-1] - w[0] + 1 == len(w) for w in where):
        out[tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)] = block
    else:
        out[torch.meshgrid(*[torch.from_numpy(w) for w in where], indexing="ij")] = block


def _zero(out: Tensor, masks: Sequence[NDArray[np.bool_] | None]) -> None:
    for d, mask in enumerate(masks):
        if mask is not None:
            out.index_fill_(d, torch.from_numpy(np.nonzero(mask)[0]), 0)


def _background(plan: TensorPlan, how: State, dtype: torch.dtype) -> Tensor:
    if plan.fill is None or how.gradient or plan.fill.kind == "zeros":
        return torch.zeros(plan.shape, dtype=dtype)
    if plan.fill.kind == "ones":
        out = torch.full(plan.shape, plan.fill.scale, dtype=dtype)
    else:
        out = torch.from_numpy(normal_fill(plan, plan.fill)).to(dtype)
    _zero(out, plan.blank)
    return out
