"""The factors on Adam's learning rate, weight decay and epsilon by which a grown run follows its source's run.

Of a tensor U = p W whose gradient is q G (p, q: the plan's coefficients of parameters and of gradients), AdamW's step
stays p times that of W with the learning rate times p, the weight decay divided by p, and epsilon times q. For copies
this is lr / C_in, decay x C_in, eps / C_out, C being the number of copies of what the tensor reads and writes. (Ma et
al., μpscaling, ICML 2026, arXiv 2602.10545, found the same for whole multiples of the width.)

The numbers come from the maps alone. Whether the run then follows exactly, `Exactness` says: function and moments must
be exact (noise on copies, say, leaves the numbers as they are, and the copies part). A tensor has no factors where no
one number holds for all of its entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import numpy as np

from bert2bert.algebra.maps import Coefficients
from bert2bert.algebra.plan import Dim, GrowthPlan, TensorPlan
from bert2bert.checkpoints.factors import ONE, Factors, GrowthFactors
from bert2bert.growth.opened import Growth
from bert2bert.growth.source_model import CheckpointModel

_SAME = 1e-9  # relative: products of the same coefficients in another order
_MOST = 1024  # classes of positions of a dim; blocks make one each
_DIFFER = "it is made of tensors that have different factors"


def factors(plan: GrowthPlan, sources: Sequence[GrowthFactors] = ()) -> GrowthFactors:
    """Of every tensor of a plan, against the run of what it starts from. sources: what the rates of that run had been
    multiplied by, one a checkpoint, by the names that the plan has for its tensors."""
    below: list[GrowthFactors] = []
    for before in plan.before:
        below.append(factors(before, sources[: before.leaves]))
        sources = sources[before.leaves :]
    inner = below or list(sources)
    other, without = dict[str, Factors](), dict[str, str]()
    for name, tensor in plan.tensors.items():
        found = _after(tensor, _own(tensor), inner)
        if isinstance(found, str):
            without[name] = found
        elif found != ONE:
            other[name] = found
    return GrowthFactors(other, without)


def of_growth(growth: Growth) -> GrowthFactors:
    """Of every tensor of an opened growth, by canonical name."""
    models = [m for m in (growth.other, growth.model) if m is not None]
    return factors(growth.plan, [_in_force(model) for model in models])


def _in_force(model: CheckpointModel) -> GrowthFactors:
    """What the source's rates had last been multiplied by, by canonical name; 1 where no manifest says so."""
    if (manifest := model.source.manifest) is None:
        return GrowthFactors()
    seen = {name: model.stored(name) for name in model.parameters}
    canonical = {stored: name for name, own in seen.items() for stored in (own, *model.source.parts(own))}
    return manifest.factors_in_force().renamed(lambda stored: canonical.get(stored, stored))


def _own(plan: TensorPlan) -> Factors | str:
    """Of a tensor against those that it is made of, or why it has none."""
    if not plan.terms:
        return "nothing of the source is in it"
    if plan.mixes or any(term.given is not None for term in plan.terms):
        return "some of its entries are mixtures of the source's, or given"
    spoken = sum(prod(int((dim.index >= 0).sum()) for dim in term.dims) for term in plan.terms)
    if spoken < prod(plan.shape):
        return "some of its entries are not the source's"
    param = _bounds(plan, [[dim.param for dim in term.dims] for term in plan.terms])
    grad = _bounds(plan, [[dim.grad for dim in term.dims] for term in plan.terms])
    if (lr := _one(*param)) is None and not plan.sums and len(plan.terms) > 1:
        lr = _spread(plan)
    if lr is None or (eps := _one(*grad)) is None:
        what, (low, high) = ("the learning rate", param) if lr is None else ("epsilon", grad)
        return f"its entries need {what} times {low:.4g} to {high:.4g}"
    return Factors(lr, 1.0 / lr, eps)


def _bounds(plan: TensorPlan, coefficients: Sequence[Sequence[Coefficients | None]]) -> tuple[float, float]:
    """The least and the largest magnitude of the coefficients of a tensor's entries; of sums, bounds. coefficients: of
    each term and dim."""
    each = []
    for term, own in zip(plan.terms, coefficients, strict=True):
        low, high = 1.0, 1.0
        for dim, values in zip(term.dims, own, strict=True):
            used = np.ones(1) if values is None else values[dim.index >= 0]
            high *= float(np.abs(used).max(initial=0.0))
            low *= float(np.abs(used).min(initial=np.inf)) if not plan.sums or (dim.full and used.min() > 0) else 0.0
        each.append((low, high))
    lows, highs = zip(*each, strict=True)
    return (sum(lows), sum(highs)) if plan.sums else (min(lows), max(highs))


def _one(low: float, high: float) -> float | None:
    """The number that all are; None if they differ, or are zero."""
    return high if 0 < high <= low * (1 + _SAME) else None


def _spread(plan: TensorPlan) -> float | None:
    """The learning rate's factor where copies differ but sum up alike in every direction, as blocks do.

    What then parts the copies from even ones changes neither outputs nor gradients, and decays alike.
    """
    classes = [_Classes([term.dims[d] for term in plan.terms]) for d in range(len(plan.shape))]
    counts = [c.counts for c in classes if c.counts is not None]
    if not len(counts) == len(classes) > 1:
        return None
    param = sum(reduce(np.multiply.outer, [c.param[t] for c in classes]) for t in range(len(plan.terms)))
    sums = [np.abs(np.tensordot(param, many, (d, 0))) for d, many in enumerate(counts)]
    if any(_one(float(each.min()), float(each.max())) is None for each in sums):
        return None
    return float(sums[0].flat[0] / counts[0].sum())


class _Classes:
    """The positions of a dim by what each term says there.

    param: [term, class] coefficients, 0 where a term is silent. counts: [class] how many positions of it copy each
    source position; None where that is not the same for all, or where there are too many classes for blocks.
    """

    def __init__(self, dims: Sequence[Dim]) -> None:
        rows = [np.where(dim.index >= 0, 1.0 if dim.param is None else dim.param, 0.0) for dim in dims]
        code = np.zeros(len(rows[0]), dtype=np.int64)
        for row in rows:
            values, of = np.unique(row, return_inverse=True)
            code = np.unique(code * len(values) + of, return_inverse=True)[1]
        first = np.unique(code, return_index=True)[1]
        self.param = np.stack(rows)[:, first]
        self.counts = None
        if len(first) <= _MOST:
            source = np.max([dim.index for dim in dims], axis=0)
            each = np.zeros((int(source.max()) + 1, len(first)))
            np.add.at(each, (source, code), 1.0)
            self.counts = each[0] if (each == each[0]).all() else None


def _after(plan: TensorPlan, own: Factors | str, inner: Sequence[GrowthFactors]) -> Factors | str:
    """A tensor's factors times those of what it is made of. inner: of each origin of its terms."""
    if isinstance(own, str) or not inner:
        return own
    below = dict[Factors, None]()
    for term in plan.terms:
        found = inner[term.origin].of(term.source)
        if found is None:
            return inner[term.origin].without[term.source]
        below[found] = None
    return own * next(iter(below)) if len(below) == 1 else _DIFFER
