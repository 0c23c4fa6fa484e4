"""From operators to a plan: apply width and depth maps to every row of a table, and derive what the result keeps.

Exactness is computed from the maps, never assumed: copies pass a norm unchanged only when every feature has equally
many; depth copies, borrowed units and filled entries change the function. Refuses (`UnsupportedGrowth`) what the maps
cannot express: shrinking, another head size, another vocabulary or number of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import mul, or_
from typing import Any

import numpy as np

from bert2bert import axes
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.maps import Gather, copies
from bert2bert.operators import parse_operator
from bert2bert.operators.depth import DEPTHS
from bert2bert.operators.width import WIDTHS, Width
from bert2bert.plan import Dim, Exactness, Fill, GrowthPlan, Noise, TensorPlan, Term
from bert2bert.tables import Parameter, Table, table_for

NOISE_SCALE = 0.1  # of the config's initializer_range; small beside the weights, large beside rounding
_FIXED = ("vocab", "pos", "types")


def plan_growth(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    width: str = "fpi",
    depth: str = "stack",
    seed: int = 0,
    breaker: str | None = None,
    heads: frozenset[str] | None = None,
) -> GrowthPlan:
    """Plan the growth of a model with config ``source`` into one with config ``target``.

    width, depth, breaker: ``NAME[:key=value,…]``. heads: which heads the checkpoint has (default: those of the
    source's class in ``architectures``). Raises UnsupportedGrowth, InvalidConfig.
    """
    if seed < 0:
        raise InvalidConfig(f"--seed is {seed}; expected a whole number of at least 0")
    table = table_for(source)
    if heads is None:
        heads = table.classes.get((source.get("architectures") or ["BertForMaskedLM"])[0], frozenset({"mlm"}))
    small, large = _check(table, source, target)
    name, options = parse_operator(width, "width")
    operator = WIDTHS[name](small, large, table.units, seed, **options)
    depth_name, depth_options = parse_operator(depth, "depth")
    layers = DEPTHS[depth_name](small["layers"], large["layers"], **depth_options)
    break_name, break_options = parse_operator(breaker, "breaker") if breaker else (None, {})
    if break_name and name not in ("fpi", "aki"):
        raise UnsupportedGrowth(
            f"--break-symmetry {break_name} with --width {name}: {name} makes no copies, so there is no symmetry to "
            f"break; leave the option out, or use --width fpi or aki"
        )
    if break_name == "uneven":
        operator = _uneven(operator, seed)
    build = _Builder(table, operator, layers, small, large, float(target.get("initializer_range", 0.02)), seed)
    originals = table.parameters(source, heads)
    tensors = {p.name: build.tensor(p) for p in table.parameters(target, heads).values()}
    if break_name == "noise":
        std = float(break_options.get("scale", NOISE_SCALE)) * build.std
        tensors = {n: build.with_noise(p, std) for n, p in tensors.items()}
    if break_name == "fresh-moments":
        tensors = {n: build.with_fresh_moments(p) for n, p in tensors.items()}
    for plan in tensors.values():
        for term in plan.terms:
            if term.source not in originals:
                raise UnsupportedGrowth(f"{plan.name} would copy {term.source}, which the source model does not have")
    recipe = {
        "width": width,
        "depth": depth,
        "break_symmetry": breaker,
        "seed": seed,
        "layers": layers,
        "heads": sorted(heads),
        "axes": {a: [small[a], large[a]] for a in small if small[a] != large[a]},
    }
    return GrowthPlan(
        tensors,
        dict(target),
        table.aliases(target, heads),
        recipe,
        _exactness(table, operator, layers, small, large, break_name),
        _warnings(table, operator, small, target, tensors, break_name),
    )


def _check(table: Table, source: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    if target.get("model_type") != table.model_type:
        raise UnsupportedGrowth(
            f"the source is a {table.model_type!r}, the target config says model_type {target.get('model_type')!r}; "
            f"a growth stays within one architecture"
        )
    small, large = table.axis_sizes(source), table.axis_sizes(target)
    for axis, key in table.sizes.items():
        if large[axis] < small[axis]:
            raise UnsupportedGrowth(
                f"target {key}={large[axis]} is smaller than the source's {small[axis]}; "
                f"a growth cannot shrink: choose a target at least as large on every axis"
            )
        if axis in _FIXED and large[axis] != small[axis]:
            raise UnsupportedGrowth(
                f"target {key}={large[axis]}, source {small[axis]}: this version does not grow {key}; "
                f"set it to {small[axis]} in the target config"
            )
    for axis in table.head_axes[:1]:
        if large[axis] != small[axis]:
            raise UnsupportedGrowth(
                f"the head size would change from {small[axis]} to {large[axis]} "
                f"(width {large['embed']} over {large['heads']} heads): whole heads are copied.\n"
                f"Set {table.sizes['heads']}={large['embed'] // small[axis]} in the target config"
                + ("." if large["embed"] % small[axis] == 0 else f" and a width that {small[axis]} divides.")
            )
    for key, default in table.must_agree.items():
        if (a := source.get(key, default)) != (b := target.get(key, default)) and None not in (a, b):
            raise UnsupportedGrowth(
                f"{key} is {a!r} in the source and {b!r} in the target config; a growth cannot change it: "
                f"set {key} to {a!r} in the target config"
            )
    return small, large


class _Builder:
    """Applies the maps of one growth to the rows of a table."""

    def __init__(
        self,
        table: Table,
        width: Width,
        layers: list[int],
        small: Mapping[str, int],
        large: Mapping[str, int],
        std: float,
        seed: int,
    ) -> None:
        self.table, self.width, self.layers = table, width, layers
        self.small, self.large, self.std, self.seed = small, large, std, seed

    def tensor(self, p: Parameter) -> TensorPlan:
        plan = TensorPlan(p.name, p.spec, p.shape, (), seed=self.seed)
        if self.width.copy:
            layer = None if p.layer is None else self.layers[p.layer]
            plan = replace(plan, terms=tuple(self._terms(p, layer)))
        silent = self.width.name == "direct" and any(not d.full for t in plan.terms for d in t.dims)
        return replace(plan, fill=_fill(p, self.std)) if silent or not self.width.copy else plan

    def _terms(self, p: Parameter, layer: int | None) -> list[Term]:
        above = layer if layer is None else min(layer + self.width.borrow, self.small["layers"] - 1)
        borrowed = self._borrowed_axis(p)
        if above == layer or borrowed is None:
            return [self._term(p, layer, layer)]
        return [self._term(p, layer, layer, borrowed, fresh=False), self._term(p, above, layer, borrowed, fresh=True)]

    def _borrowed_axis(self, p: Parameter) -> str | None:
        """The grown axis whose fresh entries come from the layer above: a unit axis; for the biases of a layer's two
        output matrices the hidden one, as the authors' code has it (this alone tells hidden copies apart)."""
        named = axes.axes_of(p.spec)
        for axis in self.table.units:
            if axis in named:
                return axis if axis in self.width.maps else None
        if p.layer is not None and p.pattern.endswith("dense.bias") and "embed" in self.width.maps:
            return "embed"
        return None

    def _term(
        self, p: Parameter, source_layer: int | None, map_layer: int | None, only: str = "", fresh: bool = False
    ) -> Term:
        def one(atom: axes.Atom) -> Gather:
            gather = self.width.at(atom.axis, map_layer, self.small[atom.axis])
            if atom.axis == only:
                gather = gather.masked((np.arange(len(gather)) >= gather.source) == fresh)
            return ~gather if atom.reads else gather

        dims = [
            Dim.of(reduce(or_, [reduce(mul, [one(a) for a in product]) for product in dim]))
            for dim in axes.parse(p.spec)
        ]
        pattern = p.pattern if source_layer is None else p.pattern.replace("{layers}", str(source_layer))
        return Term(pattern, tuple(dims))

    def with_noise(self, plan: TensorPlan, std: float) -> TensorPlan:
        """Null-space noise on the weight matrices that read a copied axis in their last dim (HyperCloning's pairs)."""
        last = axes.parse(plan.spec)[-1]
        if len(plan.shape) < 2 or not all(a.reads for product in last for a in product):
            return plan
        dim = plan.terms[0].dims[-1]
        if not dim.param or not dim.full:  # nothing copied, or borrowed units, which are no copies
            return plan
        return replace(plan, noise=Noise(std, dim.index, dim.param[0]))

    def with_fresh_moments(self, plan: TensorPlan) -> TensorPlan:
        """Zero the moments of every copy but the first (SPARKLING's asymmetric reset)."""
        masks = []
        for dim in axes.parse(plan.spec):
            parts = []
            for product in dim:
                fresh = np.zeros(1, dtype=bool)
                for atom in product:
                    mine = np.arange(self.large[atom.axis]) >= self.small[atom.axis]
                    fresh = (fresh[:, None] | mine[None, :]).reshape(-1)
                parts.append(fresh)
            mask = np.concatenate(parts)
            masks.append(mask if mask.any() else None)
        return replace(plan, fresh=tuple(masks))


def _fill(p: Parameter, std: float) -> Fill:
    """The initialisation of training from scratch: norm gains one, biases zero, weights normal."""
    if p.name.endswith("bias"):
        return Fill("zeros")
    return Fill("ones") if "LayerNorm" in p.name else Fill("normal", std)


def _uneven(width: Width, seed: int) -> Width:
    """The same copies with unequal shares (another left inverse, as LEMON takes): still exact, no longer symmetric."""

    def other(axis: str, i: int, gather: Gather) -> Gather:
        rng = np.random.default_rng((seed, 1, i, len(axis)))
        return copies(gather.index, gather.source, rng.uniform(0.5, 1.5, len(gather)))

    maps = {
        axis: other(axis, 0, m) if isinstance(m, Gather) else tuple(other(axis, i, g) for i, g in enumerate(m))
        for axis, m in width.maps.items()
    }
    return replace(width, maps=maps)


def _exactness(
    table: Table,
    width: Width,
    layers: list[int],
    small: Mapping[str, int],
    large: Mapping[str, int],
    breaker: str | None,
) -> Exactness:
    function, moments, lossy = [], [], []
    grown = [axis for axis in small if small[axis] != large[axis] and axis not in ("layers", *table.head_axes)]
    if not width.copy:
        return Exactness(("nothing of the source is copied",), ("moments start at zero",))
    if width.name == "direct" and grown:
        function.append(f"direct: entries outside the source's corner are drawn at random on {', '.join(grown)}")
        moments.append("moments outside the source's corner start at zero")
    elif width.borrow and (units := [a for a in (*table.units, "embed") if a in grown]) and small["layers"] > 1:
        function.append(f"aki: fresh features on {', '.join(units)} come from the layer above")
        moments.append("borrowed units carry the moments of the layer they come from")
    for axis in sorted(table.normalised & set(grown)):
        gather = width.at(axis, 0, small[axis])
        if width.name != "direct" and not gather.is_uniform:
            low, high = int(gather.counts.min()), int(gather.counts.max())
            lossy.append(
                f"{axis} {small[axis]} -> {large[axis]}: features have {low} to {high} copies, and a norm keeps copies "
                f"only when all have equally many"
            )
        elif width.name != "direct" and not gather.is_even:
            moments.append(f"{axis} is normalised and its copies have uneven shares")
    function += lossy
    if layers != list(range(small["layers"])):
        function.append(f"depth {small['layers']} -> {large['layers']}: stacked layers change the function")
    if function and not moments:
        moments.append("the function changes, so moments are carried over by the same maps, a heuristic")
    if breaker == "noise" and grown:
        moments.append("noise makes the readers of copies differ, so the copies' moments are right only in sum")
    if breaker == "fresh-moments" and grown:
        moments.append("moments of fresh copies start at zero by choice")
    return Exactness(tuple(function), tuple(moments), tuple(lossy))


def _warnings(
    table: Table,
    width: Width,
    small: Mapping[str, int],
    target: Mapping[str, Any],
    tensors: Mapping[str, TensorPlan],
    breaker: str | None,
) -> tuple[str, ...]:
    found = []
    even = [
        axis
        for axis, maps in width.maps.items()
        if any(g.is_even and (g.counts > 1).any() for g in ([maps] if isinstance(maps, Gather) else maps))
    ]
    # Borrowing tells copies apart, hidden ones by the biases, but the top layer has none above it to borrow from.
    borrowed = width.borrow and small["layers"] > 1
    locked = [axis for axis in even if axis in table.units] if borrowed else even
    if locked and breaker is None:
        dropout = any(float(target.get(key) or 0) for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"))
        where = " in the source's top layer, which has none above it to borrow from," if borrowed else ""
        found.append(
            f"copies on {', '.join(locked)}{where} are even and carry exactly mapped moments: without dropout they "
            f"stay identical for ever and that added width learns nothing. "
            + ("The target config has dropout, which tells them apart slowly. " if dropout else "")
            + "To break the symmetry: "
            + ("" if borrowed else "--width aki, or ")
            + "--break-symmetry noise | uneven | fresh-moments."
        )
    if any(plan.fill and plan.terms for plan in tensors.values()) or breaker == "fresh-moments":
        found.append(
            "entries with zeroed moments keep the step count, so their first Adam update is (1-beta1)/sqrt(1-beta2) "
            "times the learning rate: 3.16x for betas (0.9, 0.999), 0.71x for (0.9, 0.98). Warm the rate up again."
        )
    return tuple(found)
