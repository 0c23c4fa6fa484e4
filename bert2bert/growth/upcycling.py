"""Sparse upcycling: from a dense model to a mixture of experts of its kind, as a second step on a dense growth.

The dense model first grows, by the ordinary operators, to the target's sizes; every expert is then made of what that
would have written. Refuses (`UnsupportedGrowth`) architectures that do not belong together, an experts operator other
than upcycle, and settings in which the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bert2bert.algebra import axes
from bert2bert.algebra.plan import Dim, Exactness, Fill, GrowthPlan, TensorPlan, Term
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth.checks import check_not_random
from bert2bert.growth.choices import Choices
from bert2bert.growth.exactness import ZEROED
from bert2bert.growth.within import within
from bert2bert.operators.decisions import Pair, check_labels
from bert2bert.operators.experts import Shards
from bert2bert.operators.registry import Chosen
from bert2bert.tables import TABLES, Parameter, table_for
from bert2bert.tables.rope import OLD_KEYS

_MOMENTS = (
    "experts carry the dense layer's moments, though each learns from the tokens routed to it alone, a heuristic",
    "the routers' moments start at zero",
)


def upcycled(
    source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str], optimizer: bool
) -> GrowthPlan:
    """The plan of a growth into a mixture of experts, which rests on that of the dense model.

    optimizer: whether the source has moments. Raises UnsupportedGrowth, InvalidConfig.
    """
    experts = _experts(source, target, choices)
    pair, shards = _sparse_pair(source, target, experts, choices.seed, heads)
    check_not_random(experts, choices.width)
    inner = replace(choices, experts=None, moments=None if choices.moments == "exact" else choices.moments)
    first = within(source, pair.source, inner, heads, optimizer)
    return _upcycled(first, pair, shards, choices, optimizer)


def _experts(source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices) -> Chosen:
    """The operator that makes experts of this source. Raises UnsupportedGrowth where none can."""
    kind, found = source["model_type"], target.get("model_type")
    fit = [t.model_type for t in TABLES.values() if kind in t.compatible.dense_types]
    if found not in fit:
        raise UnsupportedGrowth(
            f"the source is a {kind!r}, the target config says model_type {found!r}; a growth stays within one "
            f"architecture ({', '.join(TABLES)})"
            + (f", or makes a {' or '.join(fit)} of a {kind} with --experts upcycle" if fit else "")
        )
    if choices.experts is None or choices.experts.operator.name != "upcycle":
        raise UnsupportedGrowth(
            f"a {found} comes from a {kind} by making experts of its feed-forward: use --experts upcycle"
            + (f", not {choices.experts}" if choices.experts else "")
        )
    return choices.experts


def _sparse_pair(
    source: Mapping[str, Any], target: Mapping[str, Any], experts: Chosen, seed: int, heads: frozenset[str]
) -> tuple[Pair, Shards]:
    """The dense model at the target's sizes with the target, and how the one becomes the other.

    Raises UnsupportedGrowth, InvalidConfig.
    """
    table, dense = table_for(target), table_for(source)
    check_labels(dense, source, target, heads)
    large = table.axis_sizes(target)
    ready = Pair(table, source, target, {**large, "experts": 0}, large, seed, heads)
    shards: Shards = experts.make(ready)
    wanted = {axis: large[axis] for axis in dense.sizes.axes if axis != "labels"} | {"ffn": large["ffn"] * shards.count}
    theirs, mine = table.settled(target), dense.settled(source)
    if (a := mine.get("sliding_window")) != (b := theirs.get("sliding_window")):
        raise UnsupportedGrowth(
            f"sliding_window is {a!r} in the source and {b!r} in the target config; set sliding_window to {a!r} there"
        )
    kinds = dense.compatible.kinds
    same = {k: v for k, v in target.items() if k in source and k not in ("model_type", "architectures", kinds)}
    agreed = {k: theirs[k] for k in mine if k in theirs}
    both = {**source, **same, **agreed}
    config = dense.resize({k: v for k, v in both.items() if k not in OLD_KEYS}, wanted)  # rope_parameters has them
    if config.get(kinds):
        config[kinds] = [config[kinds][0]] * large["layers"]
    return replace(ready, source=config, small={**dense.axis_sizes(config), "experts": 0}), shards


def _upcycled(first: GrowthPlan, pair: Pair, shards: Shards, choices: Choices, optimizer: bool) -> GrowthPlan:
    """The mixture of experts made of what ``first``, the growth of the dense model, makes.

    Raises UnsupportedGrowth for moments that cannot be exact.
    """
    moments = choices.moments
    if moments == "exact":
        raise UnsupportedGrowth(
            "--moments exact: this growth cannot keep the moments exactly:\n  " + "\n  ".join(_MOMENTS) + "\n"
            "Use --moments carried (a heuristic), asymmetric (zero for all copies but the first) or reset."
        )
    table, number = pair.table, pair.large["experts"]
    tensors = {}
    for p in table.parameters(pair.target, pair.heads).values():
        plan = _tensor(p, first, pair, shards)
        if moments == "asymmetric" and p.pattern in table.compatible.dense:
            plan = replace(plan, fresh=(np.arange(number) % (number // shards.count) > 0,))
        tensors[p.name] = replace(plan, reset=moments == "reset")
    config, eps = dict(pair.target), table.norms.eps[0]
    if first.config.get(eps) != pair.source.get(eps):
        config[eps] = first.config[eps]
    zeroed = (ZEROED,) if optimizer and moments != "reset" else ()
    return GrowthPlan(
        tensors,
        config,
        table.aliases(pair.target, pair.heads),
        {**first.recipe, "experts": str(choices.experts), "axes": {**first.recipe["axes"], "experts": [1, number]}},
        first.exactness + Exactness(shards.function, _MOMENTS),
        "carried" if first.moments == "exact" else first.moments,
        tuple(dict.fromkeys((*first.warnings, *zeroed))),
        (*first.notes, *shards.notes),
        before=(first,),
    )


def _tensor(p: Parameter, first: GrowthPlan, pair: Pair, shards: Shards) -> TensorPlan:
    plan = TensorPlan(p.name, p.spec, p.shape, (), seed=pair.seed)
    copies = pair.large["experts"] // shards.count
    if p.name in first.tensors:
        return replace(plan, terms=(Term(p.name, tuple(Dim(np.arange(n)) for n in p.shape)),))
    if p.pattern not in pair.table.compatible.dense:
        std = pair.table.std(p.pattern, pair.target)
        return replace(plan, fill=Fill("normal", std, period=copies if shards.count > 1 else 0))
    parts, ffn = pair.table.compatible.dense[p.pattern], pair.large["ffn"]
    cut = [any(a.axis == "ffn" for product in dim for a in product) for dim in axes.parse(p.spec)].index(True)
    factors = (shards.gate, shards.up) if len(parts) > 1 else (shards.down,)
    terms = []
    for shard in range(shards.count):
        mine = np.arange(p.shape[0]) // copies == shard
        for i, (part, factor) in enumerate(zip(parts, factors, strict=True)):
            own = np.arange(p.shape[cut]) // ffn == i
            dims = [Dim(np.arange(n)) for n in p.shape]
            dims[cut] = Dim(np.where(own, shard * ffn + np.arange(p.shape[cut]) % ffn, -1))
            scaled, back = (None, None) if factor == 1 else (np.full(len(mine), f) for f in (factor, 1 / factor))
            dims[0] = Dim(np.where(mine, 0, -1), scaled, back, new=True)
            name = replace(p, pattern=part).at(p.layer)
            terms.append(Term(name, tuple(dims)))
    return replace(plan, terms=tuple(terms))
