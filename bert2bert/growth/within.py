"""The plan of a growth within one architecture: the operators' decisions, applied to every row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bert2bert.algebra.plan import Exactness, GrowthPlan, TensorPlan
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.checks import check_alone, check_layers, pair_of
from bert2bert.growth.choices import Choices
from bert2bert.growth.exactness import exactness, notes, warnings
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Layer, Pair, Width
from bert2bert.operators.registry import Chosen

Layers = Mapping[str, list[Layer]]


def within(
    source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str], optimizer: bool
) -> GrowthPlan:
    """The plan of a growth that shrinks nothing. optimizer: whether the source has moments.

    Raises UnsupportedGrowth, InvalidConfig.
    """
    pair = pair_of(source, target, choices, heads)
    width, choices = _decide(pair, choices)
    layers = _layers(pair, choices.depth)
    build = Builder(pair, width, layers, pair.table.parameters(source, heads))
    kept = exactness(build)
    if width.noise and (pair.grown or choices.experts):
        reason = "noise makes the readers of copies differ, so the copies' moments are right only in sum"
        kept = kept + Exactness(moments=(reason,))
    policy, kept = _policy(choices, kept)
    tensors = _tensors(build, choices, policy)
    config = dict(target)
    if width.norms.eps != 1.0:
        key, default = pair.table.norms.eps
        config[key] = width.norms.eps * float(source.get(key, default))
    return GrowthPlan(
        tensors,
        config,
        pair.table.aliases(target, heads),
        _recipe(pair, choices, width, layers),
        kept,
        policy,
        warnings(build, tensors, choices.breaker is not None, policy, optimizer),
        notes(build, policy, optimizer),
    )


def _decide(pair: Pair, choices: Choices) -> tuple[Width, Choices]:
    """What the operators decide together, and the choices as the recipe will have them."""
    made: Width = choices.width.make(pair)
    if made.keeps_moments and choices.moments == "carried":
        made = replace(made, keeps_moments=False, reasons=replace(made.reasons, moments=()))
    if made.copying.terms is not None:
        check_alone(choices.width, choices.depth, choices.moments)
    if choices.breaker is not None:
        made = _broken(pair, made, choices.breaker, choices.width)
    recorded: dict[str, Any] = {}
    for kind, chosen in choices.extra.items():
        more: Width = chosen.make(pair)
        made |= more
        recorded[kind] = replace(chosen, text=more.recorded or chosen.text)
    return made, replace(choices, **recorded)


def _broken(pair: Pair, width: Width, breaker: Chosen, chosen: Chosen) -> Width:
    """The width with copies that differ. Raises UnsupportedGrowth where there are no copies, InvalidConfig for noise
    twice."""
    name = chosen.operator.name
    if not chosen.operator.copies:
        raise UnsupportedGrowth(
            f"--break-symmetry {breaker.operator.name} with --width {name}: {name} makes no even copies, so there is "
            f"no symmetry to break; leave the option out, or use --width fpi or aki"
        )
    if width.noise and breaker.operator.name == "noise":
        raise InvalidConfig(f"{breaker.flag} with {chosen.flag}, which has noise already; leave one of them out")
    made: Width = breaker.make(pair, width)
    return made


def _layers(pair: Pair, depth: Chosen) -> Layers:
    """Depth axis -> where each target layer comes from."""
    found = {}
    for axis in pair.table.sizes.depth:
        check_layers(pair, depth, axis)
        rows = depth.make(pair, pair.small[axis], pair.large[axis]) if pair.large[axis] else []
        found[axis] = [row if isinstance(row, Layer) else Layer(row) for row in rows]
        if len(found[axis]) != pair.large[axis]:
            raise UnsupportedGrowth(
                f"{depth.flag} makes {len(found[axis])} layers of {pair.small[axis]}; the target config says "
                f"{pair.table.key(axis)}={pair.large[axis]}: set it to {len(found[axis])}, or use --depth stack"
            )
    return found


def _policy(choices: Choices, kept: Exactness) -> tuple[str, Exactness]:
    """The moments' policy that holds, and what is kept with the reasons that it adds."""
    width, depth, asked = choices.width.operator.moments, choices.depth.operator.moments, choices.moments
    own = "exact"
    if kept.moments:
        theirs = depth if not kept.function and depth != "exact" else "carried"
        own = width if width != "exact" else theirs
    if asked == "exact" and kept.moments:
        raise UnsupportedGrowth(
            "--moments exact: this growth cannot keep the moments exactly:\n  " + "\n  ".join(kept.moments) + "\n"
            "Use --moments carried (the same maps, a heuristic), asymmetric (zero for fresh entries) or reset."
        )
    if asked == "reset":
        return asked, kept + Exactness(moments=("every moment and the step count start at zero by choice",))
    if asked == "asymmetric":
        return asked, kept + Exactness(moments=("moments of fresh entries start at zero by choice",))
    carried = asked == "carried" and kept.moments  # where they are exact, carried is exact
    return ("carried" if carried else own), kept


def _tensors(build: Builder, choices: Choices, policy: str) -> dict[str, TensorPlan]:
    """The plan of every target tensor, by the target's order."""
    pair = build.pair
    wanted = pair.table.parameters(pair.target, pair.heads)
    tensors = {n: build.tensor(p) for n, p in wanted.items()}
    if build.width.noise:
        tensors = {n: build.with_noise(p, build.width.noise) for n, p in tensors.items()}
    if choices.moments == "asymmetric":
        tensors = {n: build.with_fresh_moments(p, wanted[n]) for n, p in tensors.items()}
    if policy == "reset":
        tensors = {n: replace(p, reset=True) for n, p in tensors.items()}
    return tensors


def _recipe(pair: Pair, choices: Choices, width: Width, layers: Layers) -> dict[str, Any]:
    """What is stored with the grown checkpoint: enough to plan it again, and what a reader wants to see."""
    recipe, alone = choices.recipe(), width.copying.terms is not None
    return {
        **recipe,
        "depth": choices.width.operator.name if alone else recipe["depth"],
        "layers": {} if alone else {axis: [str(row) for row in rows] for axis, rows in layers.items()},
        "heads": sorted(pair.heads),
        "axes": {a: [pair.small[a], pair.large[a]] for a in pair.small if pair.small[a] != pair.large[a]},
    }
