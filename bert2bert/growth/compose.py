"""Plans made of plans: one after the other, the inverse of one, the mean of two.

Refuses (`UnsupportedGrowth`) plans that do not fit together, and inverses of tensors that a growth does not hold whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np

from bert2bert.algebra.maps import Coefficients
from bert2bert.algebra.plan import Dim, Exactness, GrowthPlan, Mask, TensorPlan, Term
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import Parameter, table_for


def then(first: GrowthPlan, second: GrowthPlan) -> GrowthPlan:
    """One plan for ``first`` and then ``second``, bit for bit the same as the two in sequence.

    Raises UnsupportedGrowth when the second does not start from what the first makes.
    """
    if second.before:
        raise UnsupportedGrowth(
            "a growth that rests on others can only come first in a sequence; compose from the left"
        )
    for plan in second.tensors.values():
        for source in plan.sources:
            if source not in first.tensors:
                raise UnsupportedGrowth(
                    f"the second growth reads {source}, which the first does not make; "
                    f"plan it from the config that the first one grows into"
                )
    return replace(
        second,
        before=(first,),
        recipe={"first": first.recipe, "then": second.recipe},
        exactness=first.exactness + second.exactness,
        moments=second.moments if first.moments == "exact" else first.moments,
        warnings=tuple(dict.fromkeys(first.warnings + second.warnings)),
        notes=tuple(dict.fromkeys(first.notes + second.notes)),
    )


def interpolate(a: GrowthPlan, b: GrowthPlan, alpha: float) -> GrowthPlan:
    """(1 - alpha) a + alpha b, weights and first moments; second moments (1 - alpha) v_a + alpha v_b, which bounds that
    of the mean from above. The checkpoints that ``a`` starts from come first.

    Raises InvalidConfig for an alpha outside [0, 1], UnsupportedGrowth for plans of different models.
    """
    if not 0 <= alpha <= 1:
        raise InvalidConfig(f"interpolate: alpha is {alpha}; expected a number from 0, all of the first, to 1")
    table = table_for(a.config)
    mine, theirs = ({**table.axis_sizes(p.config), **table.settled(p.config)} for p in (a, b))
    for key, value in mine.items():
        if theirs[key] != value:
            raise UnsupportedGrowth(
                f"interpolate: {key} is {value!r} in the first and {theirs[key]!r} in the second model; "
                f"grow both to one target config"
            )
    for name in a.tensors.keys() ^ b.tensors.keys():
        raise UnsupportedGrowth(f"interpolate: only one of the models has {name}; grow both to one class of model")
    parts = [(i, weight) for i, weight in enumerate((1.0 - alpha, alpha)) if weight]
    tensors = {
        n: TensorPlan(n, t.spec, t.shape, tuple(_scaled(_whole(n, t.shape, i), w) for i, w in parts),
                      sums=len(parts) > 1, reset=all((a, b)[i].tensors[n].reset for i, _ in parts))
        for n, t in a.tensors.items()
    }  # fmt: skip
    used = [(a, b)[i] for i, _ in parts]
    kept = sum((p.exactness for p in used[1:]), used[0].exactness)
    if len(parts) > 1:
        kept += Exactness(
            (f"{1 - alpha:g} of one model and {alpha:g} of another are a third one",),
            ("first moments are averaged with the weights, second moments bounded from above: a heuristic",),
        )
    return GrowthPlan(
        tensors,
        dict(a.config),
        dict(a.aliases),
        {"interpolate": [a.recipe, b.recipe], "alpha": alpha},
        kept,
        used[0].moments if len(parts) == 1 else "carried",
        tuple(w for w in used[0].warnings if all(w in p.warnings for p in used)),  # one's copies part the other's
        tuple(dict.fromkeys(n for p in used for n in p.notes)),
        (a, b),
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
    found: dict[str, list[tuple[int, str, Term]]] = {}
    for name, tensor in plan.tensors.items():
        if tensor.sums or any(d.new for term in tensor.terms for d in term.dims):
            raise UnsupportedGrowth(
                f"{plan.recipe['width']}, {plan.recipe['depth']}: {name} mixes or reshapes whole tensors, which cannot "
                f"be told apart again; shrink by a growth that copies, such as fpi, decoalesce or stack"
            )
        fresh = bool(tensor.fresh) and tensor.fresh[0] is not None and bool(tensor.fresh[0].all())
        for term in (t for t in tensor.terms if t.given is None):
            borrowed = term.source != tensor.sources[0]
            found.setdefault(term.source, []).append((2 * borrowed + fresh, name, term))
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


def _whole(name: str, shape: Sequence[int], origin: int = 0) -> Term:
    return Term(name, tuple(Dim(np.arange(n)) for n in shape), origin)


def _scaled(term: Term, factor: float) -> Term:
    """A term times a factor, as parameter and as gradient."""
    if factor == 1.0:
        return term
    first, *others = term.dims
    param, grad = (np.full(len(first.index), factor) if c is None else c * factor for c in (first.param, first.grad))
    return replace(term, dims=(replace(first, param=param, grad=grad), *others))


def _back(p: Parameter, found: Sequence[tuple[int, str, Term]]) -> TensorPlan:
    """A source tensor as the mean of the grown tensors that hold all of it: those of its own, else with fresh moments,
    else borrowers."""
    holders: dict[int, list[list[Term]]] = {}
    members: dict[tuple[int, str], list[Term]] = {}
    for rank, name, term in found:
        members.setdefault((rank, name), []).append(term)
    for (rank, name), terms in members.items():
        if whole := _held(name, terms, p.shape):
            holders.setdefault(rank, []).append(whole)
    if not holders:
        raise UnsupportedGrowth(
            f"{p.name} does not come back: no tensor of the larger model holds all of it; shrink by a growth that "
            f"copies every feature and layer"
        )
    best = holders[min(holders)]
    terms = [_scaled(term, 1.0 / len(best)) for held in best for term in held]
    return TensorPlan(p.name, p.spec, p.shape, tuple(terms), sums=len(terms) > 1)


def _held(name: str, terms: Sequence[Term], shape: Sequence[int]) -> list[Term]:
    """The terms that give a source tensor back from those that one grown tensor has of it; none if they cannot.

    Several terms (blocks) give it together where each covers it evenly.
    """
    ways = [[_Way(dim, n) for dim, n in zip(term.dims, shape, strict=True)] for term in terms]
    if len(ways) > 1 and all((way.cover == way.cover[0]).all() for each in ways for way in each):
        if total := sum(prod(float(way.cover[0]) for way in each) for each in ways):
            return [_scaled(term, 1.0 / total) for each in ways for term in _terms(name, each)]
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
        spoken = np.nonzero((dim.index >= 0) & (dim.index < size))[0]
        self.at = spoken[np.argsort(dim.index[spoken], kind="stable")]
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
