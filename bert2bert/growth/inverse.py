"""The way back of a growth: the plan from a large model to the small one, as the inverse of a growth between them.

A shrinking operator names the growth from the target to the source whose inverse it is. Refuses (`UnsupportedGrowth`) a
target that is larger on some axis, axes that no shrinking operator was chosen for, and tensors that a growth does not
hold whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isclose, prod
from typing import Any

import numpy as np

from bert2bert.algebra.maps import Coefficients
from bert2bert.algebra.plan import Dim, Exactness, GrowthPlan, Mask, TensorPlan, Term
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth.choices import Choices
from bert2bert.growth.compose import scaled
from bert2bert.growth.upcycling import upcycled
from bert2bert.growth.within import within
from bert2bert.operators.decisions import TOKENS
from bert2bert.operators.registry import FLAGS, OPERATORS, Chosen, parse_operator
from bert2bert.tables import Parameter, Table, table_for


def shrunk(
    source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str], optimizer: bool
) -> GrowthPlan:
    """The plan from ``source`` to the smaller ``target``: the inverse of the growth from target to source.

    optimizer: whether the source has moments. Raises UnsupportedGrowth, InvalidConfig.
    """
    up = _inverted(source, target, choices)
    if choices.breaker is not None or choices.moments in ("exact", "asymmetric"):
        what = f"--break-symmetry {choices.breaker}" if choices.breaker else f"--moments {choices.moments}"
        raise UnsupportedGrowth(
            f"{what}: a smaller model has no copies and no fresh entries, and its moments are sums; "
            f"leave the option out, or use --moments reset"
        )
    grown = _grown(source, target, choices, up, heads, optimizer)
    recipe = grown.recipe | {"width": str(choices.width), "depth": str(choices.depth), "moments": choices.moments}
    recipe["axes"] = {axis: sizes[::-1] for axis, sizes in grown.recipe["axes"].items()}
    alone = _injects(choices)
    recipe["layers"] = {axis: _members(rows, alone) for axis, rows in grown.recipe["layers"].items()}
    plan = replace(inverse(grown, target), recipe=recipe)
    fewer = tuple(_fewer(recipe["axes"][axis], alone) for axis in recipe["layers"] if axis in recipe["axes"])
    plan = replace(plan, exactness=plan.exactness + Exactness(fewer))
    if choices.moments != "reset":
        return plan
    reason = Exactness(moments=("every moment and the step count start at zero by choice",))
    tensors = {n: replace(t, reset=True) for n, t in plan.tensors.items()}
    return replace(plan, tensors=tensors, moments="reset", exactness=plan.exactness + reason)


def _grown(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    choices: Choices,
    up: Choices,
    heads: frozenset[str],
    optimizer: bool,
) -> GrowthPlan:
    """The growth from the target's model to the source's. Raises UnsupportedGrowth if there is none that makes it."""
    key, default = table_for(source).norms.eps
    have, want = float(source.get(key, default)), float(target.get(key, default))
    grow = within if source.get("model_type") == target.get("model_type") else upcycled
    try:
        grown = grow(target, {**source, key: want}, up, heads, optimizer)
    except UnsupportedGrowth as error:
        raise UnsupportedGrowth(
            f"{choices.width.flag} {choices.depth.flag} inverts the growth {up.width.flag} {up.depth.flag} of the "
            f"target config's model into the source's, which is not possible: {error}"
        ) from None
    if not isclose(made := float(grown.config.get(key, default)), have, rel_tol=1e-6):
        raise UnsupportedGrowth(
            f"{key} is {have:g} in the source; {up.width} would have made it {made:g} of {want:g}: "
            f"set {key} to {have * want / made:g} in the target config"
        )
    return grown


def _injects(choices: Choices) -> bool:
    """Whether a layer is the first of its group, and not the group's mean."""
    return choices.depth.options.get("restriction") == "injection"


def _fewer(sizes: Sequence[int], alone: bool) -> str:
    """Why the function of fewer layers is another. sizes: layers before and after."""
    how = "the first of its group" if alone else "the mean of its group"
    return f"depth {sizes[0]} -> {sizes[1]}: a layer becomes {how}, and fewer layers change the function"


def _members(rows: Sequence[str], alone: bool) -> list[str]:
    """Of each layer of the smaller model, the layers that it is the mean of, as '0+3'. rows: the recipe's layers of
    the growth that is inverted; alone: the first of them counts alone."""
    layers = 1 + max((int(row) for row in rows if row.isdigit()), default=-1)
    groups = [[str(i) for i, row in enumerate(rows) if row == str(layer)] for layer in range(layers)]
    return ["+".join(group[:1] if alone else group) for group in groups]


def _inverted(source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices) -> Choices:
    """The growth to invert. Refuses axes that would grow, or change without an operator that shrinks them."""
    table = table_for(source)
    large, small = table.axis_sizes(source), table_for(target).axis_sizes(target)
    sizes = (axis for axis in table.sizes.axes if axis != "labels")  # the growth that is inverted looks at those
    changed = [axis for axis in sizes if small.get(axis, large[axis]) != large[axis]]
    inside = [axis for axis in changed if axis not in (*TOKENS, "experts", *table.sizes.depth)]
    layers = [axis for axis in changed if axis in table.sizes.depth]
    found: dict[str, Any] = {}
    for chosen, axes in ((choices.width, inside), (choices.depth, layers)):
        if axes and not chosen.operator.shrinks:
            raise _no_shrinking(table, chosen, axes[0], large[axes[0]], small[axes[0]])
        found[chosen.operator.kind] = _inverse_of(chosen)
    for axis in changed:
        if small[axis] > large[axis] and axis not in ("qk", "v"):
            raise UnsupportedGrowth(
                f"target {table.key(axis)}={small[axis]} is larger than the source's {large[axis]}, and "
                f"{choices.width.flag} {choices.depth.flag} makes a model smaller; shrink first, then grow"
            )
    # where copies start with fresh moments, the layer that has not is taken for the whole group
    return replace(choices, **found, breaker=None, moments="asymmetric" if _injects(choices) else None)


def _inverse_of(chosen: Chosen) -> Chosen:
    """The growth whose inverse an operator is; itself, where it is a growth."""
    if not chosen.operator.shrinks:
        return chosen
    up = parse_operator(chosen.make(), chosen.operator.kind)
    if up.operator.shrinks:
        raise UnsupportedGrowth(f"{chosen.flag}: {up} is not a growth that could be inverted")
    return up


def _no_shrinking(table: Table, chosen: Chosen, axis: str, large: int, small: int) -> UnsupportedGrowth:
    kind = chosen.operator.kind
    names = " | ".join(name for name, other in OPERATORS[kind].items() if other.shrinks)
    return UnsupportedGrowth(
        f"{chosen.flag}: {table.key(axis)} would change from {large} to {small}, and a model is made smaller as a "
        f"whole; use {FLAGS[kind]} {names}, or do it in two steps"
    )


def inverse(plan: GrowthPlan, config: Mapping[str, Any]) -> GrowthPlan:
    """The way back from what a plan grows to the model with this config that it started from.

    Every source entry becomes the mean of its copies along the axes that its tensor writes and their sum along those
    that it reads, as L x' = x has it, and moments the other way; layers that were copied are averaged. Features and
    layers that do not come from the source, or that one layer borrowed from another, are left out. Growing and
    shrinking again changes nothing. Raises UnsupportedGrowth where a tensor does not come back.
    """
    if plan.before:
        raise UnsupportedGrowth("a growth that rests on others is undone step by step: shrink by the last one first")
    heads = frozenset(plan.recipe["heads"])
    table = table_for(config)
    found: dict[str, list[_Holder]] = {}
    for name, tensor in plan.tensors.items():
        if tensor.sums or any(d.new for term in tensor.terms for d in term.dims):
            raise UnsupportedGrowth(
                f"{plan.recipe['width']}, {plan.recipe['depth']}: {name} mixes or reshapes whole tensors, which cannot "
                f"be distinguished again; shrink by a growth that copies, such as fpi, decoalesce or stack"
            )
        fresh = bool(tensor.fresh) and tensor.fresh[0] is not None and bool(tensor.fresh[0].all())
        for term in (t for t in tensor.terms if t.given is None):
            rank = _Rank(borrowed=term.source != tensor.sources[0], fresh=fresh)
            found.setdefault(term.source, []).append(_Holder(rank, name, term))
    parameters = table.parameters(config, heads)
    tensors = {p.name: _back(p, found.get(p.name, ())) for p in parameters.values()}
    same = all(not t.sums and t.shape == plan.tensors[t.terms[0].source].shape for t in tensors.values())
    shrunk = not same or len(tensors) < len(plan.tensors)
    return GrowthPlan(
        tensors,
        dict(config),
        table.aliases(config, heads),
        plan.recipe,
        Exactness(
            ("features and layers become the mean of those that copied them, exact only while these are equal",),
            ("moments are summed up with them: exact only where all are copies, second moments at most too large",),
        )
        if shrunk
        else Exactness(),
        "carried" if shrunk else "exact",
    )


@dataclass(frozen=True, order=True)
class _Rank:
    """How good a tensor of the larger model is to give a source tensor back: the least is the best."""

    borrowed: bool
    """It has entries of the source tensor, but is not its own successor."""
    fresh: bool
    """Its moments start at zero."""


@dataclass(frozen=True, eq=False)
class _Holder:
    """A tensor of the larger model, by name, that has entries of a source tensor by this term."""

    rank: _Rank
    name: str
    term: Term


def _back(p: Parameter, found: Sequence[_Holder]) -> TensorPlan:
    """A source tensor as the mean of the grown tensors of the best rank that hold all of it."""
    members: dict[tuple[_Rank, str], list[Term]] = {}
    for holder in found:
        members.setdefault((holder.rank, holder.name), []).append(holder.term)
    whole: dict[_Rank, list[list[Term]]] = {}
    for (rank, name), terms in members.items():
        if held := _held(name, terms, p.shape):
            whole.setdefault(rank, []).append(held)
    if not whole:
        raise UnsupportedGrowth(
            f"{p.name} does not come back: no tensor of the larger model holds all of it; shrink by a growth that "
            f"copies every feature and layer"
        )
    best = whole[min(whole)]
    back = [scaled(term, 1.0 / len(best)) for held in best for term in held]
    return TensorPlan(p.name, p.spec, p.shape, tuple(back), sums=len(back) > 1)


def _held(name: str, terms: Sequence[Term], shape: Sequence[int]) -> list[Term]:
    """The terms that give a source tensor back from those that one grown tensor has of it; none if they cannot.

    Several terms (blocks) give it together where each covers it evenly.
    """
    ways = [[_Way(dim, n) for dim, n in zip(term.dims, shape, strict=True)] for term in terms]
    if len(ways) > 1 and all((way.cover == way.cover[0]).all() for each in ways for way in each):
        if total := sum(prod(float(way.cover[0]) for way in each) for each in ways):
            return [scaled(term, 1.0 / total) for each in ways for term in _terms(name, each)]
        return []
    whole = [each for each in ways if all(way.cover.all() for way in each)][:1]
    return [term for each in whole for term in _terms(name, [way.normalised() for way in each])]


def _terms(name: str, ways: Sequence[_Way]) -> list[Term]:
    return [Term(name, dims) for dims in product(*(way.copies() for way in ways))]


class _Way:
    """The way back along one dim: the positions that copy each source position, with weights.

    The weights of parameters are the growth's coefficients of gradients and the other way round, for L E = I. cover:
    [source] how much of each position they give back together, as parameter and as gradient alike.
    """

    def __init__(self, dim: Dim, size: int) -> None:
        written = np.nonzero((dim.index >= 0) & (dim.index < size))[0]
        self.at = written[np.argsort(dim.index[written], kind="stable")]
        self.index, self.size = dim.index[self.at], size
        param, grad = (np.ones(len(self.at)) if c is None else c[self.at] for c in (dim.param, dim.grad))
        self.weights = [grad, param]
        self.cover = np.bincount(self.index, weights=grad * param, minlength=size)

    def normalised(self) -> _Way:
        """With weights that give every position back once."""
        total = np.where(np.abs(self.cover - 1.0) < 1e-12, 1.0, self.cover)
        self.weights = [weight / total[self.index] for weight in self.weights]
        return self

    def copies(self) -> Iterator[Dim]:
        """The first copy of every position that has one, the second one, …"""
        counts = np.bincount(self.index, minlength=self.size)
        ranks = np.arange(len(self.at)) - np.repeat(np.cumsum(counts) - counts, counts)
        for rank in range(counts.max()):
            mine = ranks == rank
            copy = np.full(self.size, -1, dtype=np.int64)
            copy[self.index[mine]] = self.at[mine]
            param, grad = (self._spread(weight, mine) for weight in self.weights)
            yield Dim(copy, param, grad)

    def _spread(self, weight: Coefficients, mine: Mask) -> Coefficients | None:
        factors = np.ones(self.size)
        factors[self.index[mine]] = weight[mine]
        return None if (factors == 1.0).all() else factors
