"""Up and down between levels: coalesce, decoalesce, share, and shrink, the way back of any growth that copies.

A shrinking operator names the growth from the target to the source whose inverse it is. Refuses (`UnsupportedGrowth`) a
target that is larger on some axis, and axes that no shrinking operator was chosen for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isclose
from typing import Any, Literal

from bert2bert.algebra.plan import Exactness, GrowthPlan
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth.compose import inverse
from bert2bert.operators.decisions import TOKENS, Layer, Pair, Width
from bert2bert.operators.registry import FLAGS, OPERATORS, operator, parse_operator
from bert2bert.operators.width_bert2bert import fpi
from bert2bert.tables import table_for

Order = Literal["interleave", "stack"]
_PAPER = "Zou et al., Multi-Level Framework, ICLR 2024"
_SWE = "Yang et al., Sharing Weights and Then Unsharing, 2021"


@operator(
    "width", "decoalesce", paper=_PAPER, copies=True,
    keeps="the function, where the new width is a multiple of the old one",
)  # fmt: skip
def decoalesce(pair: Pair) -> Width:
    """Tiled copies, x' = [x, x, …]: outputs are copied, inputs divided by the number of copies.

    The paper halves the word embeddings for a tied head; here the norm before the head is halved, which is exact in
    GPT-2 too.
    """
    return replace(fpi(pair, choice="left"), name="decoalesce")


@operator("depth", "decoalesce", paper=_PAPER, keeps="nothing exactly", moments="carried")
def decoalesce_layers(pair: Pair, source: int, target: int, *, order: Order = "interleave") -> Sequence[int | Layer]:
    """Copies of layers. order: 'interleave', side by side (0 0 1 1), as the paper has it; 'stack' (0 1 0 1), as its
    released settings do."""
    if order == "stack":
        return [i % source for i in range(target)]
    return [i * source // target for i in range(target)]


@operator("width", "coalesce", paper=_PAPER, keeps="what copies share", moments="carried", shrinks=True)
def coalesce() -> str:
    """The way back of decoalesce: features i, i + n, … become one, averaged where written and summed where read.

    After training at the smaller size, decoalesce, and interpolate with the checkpoint from before: a V-cycle.
    """
    return "decoalesce"


@operator("depth", "coalesce", paper=_PAPER, keeps="what copies share", moments="carried", shrinks=True)
def coalesce_layers(*, order: Order = "interleave") -> str:
    """Layers become the mean of their group. order: 'interleave', of neighbours; 'stack', of layers i, i + n, …"""
    return f"decoalesce:order={order}"


@operator("depth", "share", paper=_SWE, keeps="what shared layers have in common", moments="carried", shrinks=True)
def share(*, gradient: Literal["mean", "sum"] = "mean") -> str:
    """The way back of unshare: A layers, each the mean of the layers i, i + A, i + 2A, …

    gradient, what the shared weights will be trained with: 'mean' of the runs' gradients, moments are averaged; 'sum',
    they are added.
    """
    return f"unshare:gradient={gradient}"


@operator("width", "shrink", paper="the inverse of any growth that copies", keeps="what copies share",
          moments="carried", shrinks=True)  # fmt: skip
def shrink(*, of: str = "fpi") -> str:
    """The way back of another width operator, L in place of E: a feature is the mean of its copies where written and
    their sum where read; features that are no copies are dropped.

    of: the operator, with its options and the seed of the growth. shrink(grow(x)) = x.
    """
    return of


@operator("depth", "shrink", paper="the inverse of any growth that copies", keeps="what copies share",
          moments="carried", shrinks=True)  # fmt: skip
def shrink_layers(*, of: str = "stack") -> str:
    """The way back of another depth operator: a layer is the mean of its copies; inserted layers are dropped.

    of: the operator, with its options.
    """
    return of


def shrinks(width: str, depth: str) -> bool:
    """Whether one of the two operators makes a model smaller."""
    return any(parse_operator(text, kind)[0].shrinks for kind, text in (("width", width), ("depth", depth)))


def plan_shrink(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    width: str = "coalesce",
    depth: str = "coalesce",
    breaker: str | None = None,
    moments: str | None = None,
    **how: Any,
) -> GrowthPlan:
    """Plan the way back from ``source`` to the smaller ``target``: the inverse of the growth from target to source.

    how: as of `growth.plan_growth`. Raises UnsupportedGrowth, InvalidConfig.
    """
    from bert2bert.growth.plan import plan_growth  # which comes here for operators that shrink

    texts: dict[str, Any] = _inverted(source, target, {"width": width, "depth": depth})
    if breaker is not None or moments in ("exact", "asymmetric"):
        what = f"--break-symmetry {breaker}" if breaker is not None else f"--moments {moments}"
        raise UnsupportedGrowth(
            f"{what}: a smaller model has no copies and no fresh entries, and its moments are sums; "
            f"leave the option out, or use --moments reset"
        )
    key, default = table_for(source).eps
    epsilon = float(source.get(key, default)), float(target.get(key, default))
    try:
        grown = plan_growth(target, {**source, key: epsilon[1]}, **texts, **how)
    except UnsupportedGrowth as error:
        raise UnsupportedGrowth(
            f"--width {width} --depth {depth} inverts the growth --width {texts['width']} --depth {texts['depth']} of "
            f"the target config's model into the source's, which is not possible: {error}"
        ) from None
    if not isclose(made := float(grown.config.get(key, default)), epsilon[0], rel_tol=1e-6):
        raise UnsupportedGrowth(
            f"{key} is {epsilon[0]:g} in the source; {texts['width']} would have made it {made:g} of {epsilon[1]:g}: "
            f"set {key} to {epsilon[0] * epsilon[1] / made:g} in the target config"
        )
    plan = inverse(grown, target)
    recipe = grown.recipe | {"width": width, "depth": depth, "moments": moments}
    recipe["axes"] = {axis: sizes[::-1] for axis, sizes in grown.recipe["axes"].items()}
    recipe["layers"] = {
        axis: ["+".join(str(i) for i, row in enumerate(rows) if row == str(layer)) for layer in range(_layers(rows))]
        for axis, rows in grown.recipe["layers"].items()
    }
    plan = replace(plan, recipe=recipe)
    if moments != "reset":
        return plan
    reason = Exactness(moments=("every moment and the step count start at zero by choice",))
    tensors = {n: replace(t, reset=True) for n, t in plan.tensors.items()}
    return replace(plan, tensors=tensors, moments="reset", exactness=plan.exactness + reason)


def _layers(rows: Sequence[str]) -> int:
    return 1 + max(int(row) for row in rows if row.isdigit())


def _inverted(source: Mapping[str, Any], target: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The growths to invert. Refuses axes that would grow, or change without an operator that shrinks them."""
    table = table_for(source)
    large, small = table.axis_sizes(source), table_for(target).axis_sizes(target)
    sizes = (axis for axis in table.sizes if axis != "labels")  # the growth that is inverted looks at those
    changed = [axis for axis in sizes if small.get(axis, large[axis]) != large[axis]]
    inside = [a for a in changed if a not in (*TOKENS, "experts", *table.depth)]
    found = {}
    for kind, axes in (("width", inside), ("depth", [a for a in changed if a in table.depth])):
        chosen, options = parse_operator(texts[kind], kind)
        found[kind] = chosen.make(**options) if chosen.shrinks else texts[kind]
        if axes and not chosen.shrinks:
            names = [name for name, other in OPERATORS[kind].items() if other.shrinks]
            raise UnsupportedGrowth(
                f"{FLAGS[kind]} {texts[kind]}: {table.key(axes[0])} would change from {large[axes[0]]} to "
                f"{small[axes[0]]}, and a model is made smaller as a whole; use {FLAGS[kind]} {' | '.join(names)}, or "
                f"do it in two steps"
            )
        if parse_operator(found[kind], kind)[0].shrinks:
            raise UnsupportedGrowth(f"{FLAGS[kind]} {texts[kind]}: {found[kind]} is no growth that could be inverted")
    for axis in changed:
        if small[axis] > large[axis] and axis not in ("qk", "v"):
            raise UnsupportedGrowth(
                f"target {table.key(axis)}={small[axis]} is larger than the source's {large[axis]}, and --width "
                f"{texts['width']} --depth {texts['depth']} makes a model smaller; shrink first, then grow"
            )
    return found
