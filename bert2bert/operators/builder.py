"""From what the operators decide to tensor plans: applies width and depth maps to every row of a table.

Refuses (`UnsupportedGrowth`) a growth that would copy a tensor which the source model does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod, sqrt
from operator import mul, or_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Coefficients, Gather, identity, scalar
from bert2bert.algebra.plan import Dim, Fill, Noise, TensorPlan, Term
from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import TOKENS, Layer, Pair, Width
from bert2bert.tables import Parameter

Mask = NDArray[np.bool_]


class Builder:
    """Applies one growth to the rows of a table. layers: depth axis -> where each target layer comes from."""

    def __init__(
        self,
        pair: Pair,
        width: Width,
        layers: Mapping[str, Sequence[Layer]],
        originals: Mapping[str, Parameter],
    ) -> None:
        self.pair, self.width, self.layers, self.originals = pair, width, layers, originals
        self.copying = width.copying
        self.table, self.small, self.large = pair.table, pair.small, pair.large
        later = {name for axis in self.table.sizes.depth for name in self.table.later(axis)}
        wanted = {p.pattern for p in self.table.parameters(pair.target, pair.heads).values()}
        self.patterns = {p.pattern for p in originals.values()} | (wanted & later)  # a source of one layer has no later
        self.single = {r.name for r in self.table.rows if not r.has(1)} - {r.name for r in self.table.rows if r.has(1)}
        self.output_biases = pair.output_biases
        self._shared: dict[tuple[str, int | None], tuple[Dim, ...]] = {}

    def tensor(self, p: Parameter) -> TensorPlan:
        """The plan of one target tensor."""
        plan = TensorPlan(p.name, p.spec, p.shape, (), seed=self.pair.seed)
        layer = self.layers[p.depth][p.layer] if p.layer is not None else Layer(None)
        if self.copying.nothing or (p.layer is not None and layer.source is None):
            silent = layer.identity and self._writes_residual(p)
            return replace(plan, fill=Fill("zeros") if silent else self._fill(p))
        source = p.at(layer.source)
        if source not in self.originals:
            if p.pattern in self.patterns:  # a layer that lacks it, as ModernBERT's first lacks a norm
                return replace(plan, fill=self._fill(p))
            raise UnsupportedGrowth(f"{p.name} would copy {source}, which the source model does not have")
        if layer.identity:
            plan = replace(plan, fresh=(np.ones(p.shape[0], dtype=bool),))
            if self._writes_residual(p):
                return replace(plan, fill=Fill("zeros"))
        if self.copying.terms is not None:
            terms = self.copying.terms(self, p)
        else:
            terms = tuple(self._blocks(p, layer.source) if self.copying.blocks else self._terms(p, layer.source))
        if p.name in self.copying.given:
            terms = self._given(terms, self.copying.given[p.name])
        plan = replace(plan, terms=terms, sums=self.copying.terms is not None and len(terms) > 1)
        if self.width.keeps_moments:
            kept = [replace(t, dims=tuple(replace(d, grad=None) for d in t.dims)) for t in terms]
            plan = replace(self.with_fresh_moments(plan), terms=tuple(kept))
        if layer.moment != 1.0 and p.pattern not in self.single:
            plan = replace(plan, terms=tuple(_scaled(t, grad=layer.moment) for t in plan.terms))
        if layer.step != 1.0 and self._writes_residual(p):
            plan = replace(plan, terms=tuple(_scaled(t, layer.step, 1.0 / layer.step) for t in plan.terms))
        if any(not _covered([t.dims[d] for t in terms]) for d in range(len(p.shape))):
            plan = replace(plan, fill=self._fill(p), blank=self._blank(p, layer.source))
        return plan

    def map(self, axis: str, layer: int | None) -> Gather:
        """The map of an axis in a source layer. Raises UnsupportedGrowth where a grown axis has none."""
        found = self.width.maps.get(axis)
        if found is None:
            if axis in self.table.sizes.follows:
                return self.map(self.table.sizes.follows[axis], layer)
            if (of := self.table.sizes.scales.get(axis)) and self.small[of] != self.large[of]:
                return scalar(sqrt(self.large[of] / self.small[of]))
            if self.small[axis] != self.large[axis]:
                raise UnsupportedGrowth(f"--width {self.width.name} cannot grow the axis {axis}")
            return identity(self.small[axis])
        return found if isinstance(found, Gather) else found[layer or 0]

    def gathers(self, p: Parameter, layer: int | None) -> list[Gather]:
        """One map a dim of a tensor, as it is applied to a parameter."""

        def one(atom: axes.Atom) -> Gather:
            gather = self.map(atom.axis, layer)
            return ~gather if atom.reads else gather

        return [reduce(or_, [reduce(mul, [one(a) for a in product]) for product in dim]) for dim in axes.parse(p.spec)]

    def _dims(self, p: Parameter, layer: int | None) -> tuple[Dim, ...]:
        """The dims that a tensor of this form gets: one set of arrays for all layers that have the same maps."""
        key = (p.spec, layer if any(map(self._by_layer, axes.axes_of(p.spec))) else None)
        if key not in self._shared:
            self._shared[key] = tuple(Dim.of(g) for g in self.gathers(p, layer))
        return self._shared[key]

    def _by_layer(self, axis: str) -> bool:
        """Whether an axis has a map for each source layer."""
        if axis not in self.width.maps and axis in self.table.sizes.follows:
            return self._by_layer(self.table.sizes.follows[axis])
        return not isinstance(self.width.maps.get(axis), Gather | None)

    def with_noise(self, plan: TensorPlan, scale: float) -> TensorPlan:
        """Null-space noise on a weight that reads copied features (HyperCloning's pairs)."""
        if len(plan.shape) < 2 or not plan.terms:
            return plan
        for d, (spec, dim) in enumerate(zip(axes.parse(plan.spec), plan.terms[0].dims, strict=True)):
            reads = all(a.reads for product in spec for a in product)
            index = np.max([t.dims[d].index for t in plan.terms], 0) if self.copying.blocks else dim.index
            if not reads or dim.param is None or dim.grad is not None or (index < 0).any() or dim.mix is not None:
                continue  # nothing copied, or borrowed units, which are not copies
            return replace(plan, noise=Noise(scale * self.table.std("", self.pair.target), d, _siblings(index)))
        experts = self.width.maps.get("experts")
        if isinstance(experts, Gather) and plan.spec.startswith("experts embed"):  # chosen together, they add up
            return replace(plan, noise=Noise(scale * self.table.std("", self.pair.target), 0, _siblings(experts.index)))
        return plan

    def with_fresh_moments(self, plan: TensorPlan, p: Parameter | None = None) -> TensorPlan:
        """Zero the moments of every entry that the source does not have (SPARKLING's asymmetric reset). p: the tensor,
        where all of it is fresh in a layer that copies one which a lower layer copies too."""
        if plan.fresh:
            return plan
        if p is not None and p.layer is not None:
            rows = self.layers[p.depth]
            if any(row.source == rows[p.layer].source and not row.identity for row in rows[: p.layer]):
                return replace(plan, fresh=(np.ones(p.shape[0], dtype=bool),))

        def fresh(atom: axes.Atom) -> Mask:
            return np.arange(self.large[atom.axis]) >= self.small[atom.axis]

        masks = self._masks(plan.spec, fresh)
        return replace(plan, fresh=tuple(m if m.any() else None for m in masks))

    def _terms(self, p: Parameter, layer: int | None) -> list[Term]:
        dims = self._dims(p, layer)
        above = layer
        if layer is not None and self.copying.borrow:
            above = min(max(layer + self.copying.borrow, 0), self.small[p.depth] - 1)
        borrowed = self._borrowed(p) if above != layer else None
        if borrowed is None or p.at(above) not in self.originals:
            return [Term(p.at(layer), dims)]
        d, fresh = borrowed
        own = tuple(dim.where(~fresh) if i == d else dim for i, dim in enumerate(dims))
        taken = tuple(dim.where(fresh) if i == d else dim for i, dim in enumerate(dims))
        return [Term(p.at(layer), own), Term(p.at(above), taken)]

    def _given(self, terms: tuple[Term, ...], rows: NDArray[Any]) -> tuple[Term, ...]:
        """The terms for the old tokens, and given rows, the first dim of which is theirs, for the new ones."""
        fresh = np.maximum(np.arange(len(terms[0].dims[0].index)) - self.small["vocab"], -1)
        old = (replace(t, dims=(t.dims[0].where(fresh < 0), *t.dims[1:])) for t in terms)
        return (*old, *(Term("", (Dim(fresh), *t.dims[1:]), given=rows) for t in terms))

    def _borrowed(self, p: Parameter) -> tuple[int, Mask] | None:
        """The dim whose fresh entries come from another layer, and which those are: fresh units; for the biases of a
        layer's residual writers the hidden entries, as bert2BERT's authors' code has it (this alone tells hidden copies
        apart)."""
        units = {a for a in self.table.sizes.units if a in self.width.maps}
        if p.pattern in self.output_biases and "embed" in self.width.maps:
            units = {"embed"}

        def fresh(atom: axes.Atom) -> Mask:
            return (np.arange(self.large[atom.axis]) >= self.small[atom.axis]) & (atom.axis in units)

        for d, mask in enumerate(self._masks(p.spec, fresh)):
            if mask.any():
                return d, mask
        return None

    def _blocks(self, p: Parameter, layer: int | None) -> list[Term]:
        """Block-diagonal weights; the gradients of all blocks are those of even copies, also off the diagonal."""
        dims, name = self._dims(p, layer), p.at(layer)
        spec, fixed = axes.parse(p.spec), {*TOKENS, "experts"}
        copied = [
            d
            for d, dim in enumerate(dims)
            if len(np.unique(dim.index)) < len(dim.index) and not any(a.axis in fixed for a in spec[d][0])
        ]
        if len(copied) < 2:
            return [Term(name, dims)]
        ranks = {d: _ranks(dims[d].index) for d in copied}
        terms = []
        write, read = sorted(copied, key=lambda d: all(a.reads for product in spec[d] for a in product))
        for block in range(self.copying.blocks):
            for on in (True, False):
                cut = list(dims)
                for d in copied:
                    mask = ranks[d] == block
                    keep = mask if on or d == write else ~mask
                    param = np.full(len(mask), float(on)) if d == read else dims[d].param
                    cut[d] = replace(dims[d], param=param).where(keep)
                terms.append(Term(name, tuple(cut)))
        return terms

    def _masks(self, spec: str, one: Callable[[axes.Atom], Mask]) -> list[Mask]:
        """Per dim, where any atom of a product says so."""

        def either(a: Mask, b: Mask) -> Mask:
            joined: Mask = (a[:, None] | b[None, :]).reshape(-1)
            return joined

        return [np.concatenate([reduce(either, map(one, product)) for product in dim]) for dim in axes.parse(spec)]

    def _blank(self, p: Parameter, layer: int | None) -> tuple[Mask | None, ...]:
        def blank(atom: axes.Atom) -> Mask:
            return (self.map(atom.axis, layer).index < 0) & (("~" * atom.reads + atom.axis) in self.width.fresh.blank)

        return tuple(m if m.any() else None for m in self._masks(p.spec, blank))

    def _writes_residual(self, p: Parameter) -> bool:
        writes = p.layer is not None and any(a.axis == "embed" and not a.reads for a in _atoms(p.spec))
        norm = not self.table.norms.pre and len(p.shape) == 1 and p.pattern not in self.output_biases
        return writes and not norm

    def _fill(self, p: Parameter) -> Fill:
        """The initialisation of training from scratch: norm gains one, biases zero, weights normal."""
        factor = prod(self.width.fresh.std.get("~" * a.reads + a.axis, 1.0) for a in _atoms(p.spec))
        if len(p.shape) == 1 and p.name.endswith("weight"):
            return Fill("ones", scale=factor)
        if p.name.endswith("bias"):
            return Fill("zeros")
        return Fill("normal", factor * (self.width.fresh.std.get("") or self.table.std(p.pattern, self.pair.target)))


def _atoms(spec: str) -> list[axes.Atom]:
    return [atom for dim in axes.parse(spec) for product in dim for atom in product]


def _covered(dims: Sequence[Dim]) -> bool:
    """Whether at least one term writes every position of a dim."""
    return any(d.full for d in dims) or bool((np.max([d.index for d in dims], 0) >= 0).all())


def _scaled(term: Term, param: float = 1.0, grad: float = 1.0) -> Term:
    """The term with its values and its gradients multiplied: on the first dim, for both are linear in each."""
    first, *others = term.dims

    def times(old: Coefficients | None, factor: float) -> Coefficients | None:
        if factor == 1.0:
            return old
        return np.full(len(first.index), factor) if old is None else factor * old

    scaled = replace(first, param=times(first.param, param), grad=times(first.grad, grad))
    return replace(term, dims=(scaled, *others))


def _siblings(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every position the next that copies the same source position, round and round."""
    order = np.argsort(index, kind="stable")
    starts = np.nonzero(np.diff(index[order], prepend=-1))[0]
    after = np.append(np.arange(1, len(order)), 0)
    after[np.append(starts[1:], len(order)) - 1] = starts
    sibling = np.empty_like(order)
    sibling[order] = order[after]
    return sibling


def _ranks(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of every position, how many before it copy the same source position."""
    order = np.argsort(index, kind="stable")
    starts = np.nonzero(np.diff(index[order], prepend=-1))[0]
    ranks = np.empty_like(index)
    ranks[order] = np.arange(len(index)) - np.repeat(starts, np.diff(np.append(starts, len(index))))
    return ranks
