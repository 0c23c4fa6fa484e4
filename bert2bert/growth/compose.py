"""Plans made of plans: one after the other, the mean of two. (The inverse of one: `inverse`.)

Refuses (`UnsupportedGrowth`) plans that do not fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bert2bert.algebra.plan import Dim, Exactness, GrowthPlan, TensorPlan, Term
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import table_for


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
        n: TensorPlan(n, t.spec, t.shape, tuple(scaled(_whole(n, t.shape, i), w) for i, w in parts),
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


def _whole(name: str, shape: Sequence[int], origin: int = 0) -> Term:
    return Term(name, tuple(Dim(np.arange(n)) for n in shape), origin)


def scaled(term: Term, factor: float) -> Term:
    """A term times a factor, as parameter and as gradient."""
    if factor == 1.0:
        return term
    first, *others = term.dims
    param, grad = (np.full(len(first.index), factor) if c is None else c * factor for c in (first.param, first.grad))
    return replace(term, dims=(replace(first, param=param, grad=grad), *others))
