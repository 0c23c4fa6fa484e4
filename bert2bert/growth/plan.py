"""From operators' names to a plan of a whole growth.

Refuses (`UnsupportedGrowth`) what the maps cannot express, and says what would work: shrinking, another head size where
an operator copies whole heads, settings that a growth cannot change, sizes that no operator was chosen for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bert2bert.algebra.plan import Exactness, GrowthPlan
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.exactness import exactness, notes, warnings
from bert2bert.growth.upcycling import sparse_pair, upcycled
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Layer, Pair, Width, check_labels
from bert2bert.operators.registry import OPERATORS, Operator, parse_operator
from bert2bert.operators.shrinking import plan_shrink, shrinks
from bert2bert.tables import TABLES, Table, table_for

MOMENTS = ("exact", "carried", "reset", "asymmetric")
# kind of operator -> the axis that it grows
EXTRA = {"vocab": "vocab", "positions": "pos", "experts": "experts"}
_UNSAID = ("pad_token_id", "max_position_embeddings")  # null says nothing of the function; a null window does


def plan_growth(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    width: str = "fpi",
    depth: str = "stack",
    vocab: str | None = None,
    positions: str | None = None,
    experts: str | None = None,
    seed: int = 0,
    breaker: str | None = None,
    moments: str | None = None,
    heads: frozenset[str] | None = None,
    optimizer: bool = True,
) -> GrowthPlan:
    """Plan the growth of a model with config ``source`` into one with config ``target``.

    width, depth, vocab, positions, experts, breaker: ``NAME[:key=value,…]``. moments: a policy in place of the
    operators' own. heads: which heads the checkpoint has (default: those of the source's class in ``architectures``).
    optimizer: whether it has moments, without which warnings and notes say nothing of them.
    Raises UnsupportedGrowth, InvalidConfig.
    """
    if seed < 0:
        raise InvalidConfig(f"--seed is {seed}; expected a whole number of at least 0")
    if moments is not None and moments not in MOMENTS:
        raise InvalidConfig(f"--moments is {moments!r}; expected one of {', '.join(MOMENTS)}")
    if depth == width.partition(":")[0] == "ligo":
        depth = "stack"  # its maps cover the depth; so its recipe says, by which verify plans it again
    table = table_for(source)
    if heads is None:
        first = (source.get("architectures") or [None])[0]
        heads = table.classes.get(first, next(iter(table.classes.values())))
    extra = {"vocab": vocab, "positions": positions, "experts": experts}
    if shrinks(width, depth):
        how: dict[str, Any] = {"seed": seed, "breaker": breaker, "moments": moments, "heads": heads, **extra}
        return plan_shrink(source, target, width=width, depth=depth, optimizer=optimizer, **how)
    operator, options = parse_operator(width, "width")
    if target.get("model_type") != table.model_type:
        ready, shards = sparse_pair(source, target, experts, seed, heads)
        _check_random("experts", str(experts), operator)
        first = plan_growth(
            source, ready.source, width=width, depth=depth, vocab=vocab, positions=positions, seed=seed,
            breaker=breaker, moments=moments if moments != "exact" else None, heads=heads, optimizer=optimizer,
        )  # fmt: skip
        return upcycled(first, ready, shards, str(experts), moments, optimizer)
    pair = pair_of(table, source, target, operator, extra, seed, heads)
    made: Width = operator.make(pair, **options)
    if made.kept and moments == "carried":
        made = replace(made, kept=False, moments=())
    if made.terms is not None:
        _alone(operator, depth, moments)
    layers = _layers(pair, depth)
    noise = made.noise or None
    if breaker is not None:
        broken, broken_options = parse_operator(breaker, "breaker")
        if not operator.copies:
            raise UnsupportedGrowth(
                f"--break-symmetry {broken.name} with --width {operator.name}: {operator.name} makes no even copies, "
                f"so there is no symmetry to break; leave the option out, or use --width fpi or aki"
            )
        result = broken.make(pair, made, **broken_options)
        if noise and not isinstance(result, Width):
            raise InvalidConfig(
                f"--break-symmetry {breaker} with --width {width}, which has noise already; leave one of them out"
            )
        made, noise = (result, noise) if isinstance(result, Width) else (made, result)
    for kind, text in extra.items():
        if text is not None:
            chosen, chosen_options = parse_operator(text, kind)
            more: Width = chosen.make(pair, **chosen_options)
            made, extra[kind] = made | more, more.said or text
    build = Builder(pair, made, layers, table.parameters(source, heads))
    wanted = table.parameters(target, heads)
    tensors = {n: build.tensor(p) for n, p in wanted.items()}
    if noise is not None:
        tensors = {n: build.with_noise(p, noise) for n, p in tensors.items()}
    kept = exactness(pair, made, {} if made.terms else layers, build)
    if noise is not None and (pair.grown or experts):
        reason = "noise makes the readers of copies differ, so the copies' moments are right only in sum"
        kept = kept + Exactness(moments=(reason,))
    policy, kept = _policy(moments, operator, parse_operator(depth, "depth")[0], kept)
    if moments == "asymmetric":
        tensors = {n: build.with_fresh_moments(p, wanted[n]) for n, p in tensors.items()}
    if policy == "reset":
        tensors = {n: replace(p, reset=True) for n, p in tensors.items()}
    recipe = {
        "width": width,
        "depth": depth if made.terms is None else operator.name,
        **{kind: text for kind, text in extra.items() if text is not None},
        "break_symmetry": breaker,
        "moments": moments,
        "seed": seed,
        "layers": {axis: [str(row) for row in rows] for axis, rows in layers.items() if made.terms is None},
        "heads": sorted(heads),
        "axes": {a: [pair.small[a], pair.large[a]] for a in pair.small if pair.small[a] != pair.large[a]},
    }
    config = dict(target)
    if made.eps != 1.0:
        config[table.eps[0]] = made.eps * float(source.get(*table.eps))
    return GrowthPlan(
        tensors,
        config,
        table.aliases(target, heads),
        recipe,
        kept,
        policy,
        warnings(pair, made, build, tensors, breaker, policy, optimizer),
        notes(pair, made, build, policy, optimizer),
    )


def _alone(operator: Operator, depth: str, moments: str | None) -> None:
    """Refuse what cannot stand beside an operator that makes mixtures of features and layers."""
    if depth != "stack":
        raise UnsupportedGrowth(f"--depth {depth} with --width {operator.name}, which covers the depth: leave it out")
    if moments not in (None, "reset"):
        raise UnsupportedGrowth(
            f"--moments {moments} with --width {operator.name}: the second moment of a sum of features or layers is "
            f"not determined by those of its summands, so every moment starts anew; leave the option out, or say reset"
        )


def _check_extra(table: Table, kind: str, text: str, grows: bool, operator: Operator) -> None:
    """Refuse an operator on tokens, positions or experts that would do nothing."""
    axis, what = EXTRA[kind], f"--{kind} {text}"
    chosen, _ = parse_operator(text, kind)
    if axis not in table.sizes and kind == "positions":
        raise UnsupportedGrowth(
            f"{what}: a {table.model_type} has no table of positions (they are rotary, or relative distances), so a "
            f"longer context needs no operator; leave --positions out"
        )
    if axis not in table.sizes:
        fit = [t.model_type for t in TABLES.values() if table.model_type in t.dense_types]
        raise UnsupportedGrowth(
            f"{what}: a {table.model_type} has no experts; "
            + (f"--experts upcycle makes a {' or '.join(fit)} of it: give a target config of that" if fit else
               f"a llama, mistral or qwen3 can be upcycled, and a mixture of experts can have more; leave --{kind} out")
        )  # fmt: skip
    if chosen.name == "upcycle":
        raise UnsupportedGrowth(
            f"{what}: the source is a mixture of experts already, and upcycle starts from a dense model; use --experts "
            f"duplicate"
        )
    if not grows:
        raise InvalidConfig(
            f"{what}: {table.key(axis)} is the same in source and target, so there is nothing to make; leave --{kind} "
            f"out, or set a larger {table.key(axis)} in the target config"
        )
    _check_random(kind, text, operator)


def _check_random(kind: str, text: str, operator: Operator) -> None:
    if operator.name == "random":
        raise InvalidConfig(
            f"--{kind} {text} with --width random, which copies nothing of the source; leave --{kind} out"
            + (", and train the mixture of experts from scratch" if text.startswith("upcycle") else "")
        )


def _policy(moments: str | None, width: Operator, depth: Operator, kept: Exactness) -> tuple[str, Exactness]:
    """The moments' policy that holds, and the reasons that it adds."""
    own = "exact"
    if kept.moments:
        theirs = depth.moments if not kept.function and depth.moments != "exact" else "carried"
        own = width.moments if width.moments != "exact" else theirs
    policy = moments or own
    if moments == "exact" and kept.moments:
        raise UnsupportedGrowth(
            "--moments exact: this growth cannot keep the moments exactly:\n  " + "\n  ".join(kept.moments) + "\n"
            "Use --moments carried (the same maps, a heuristic), asymmetric (zero for fresh entries) or reset."
        )
    if moments is None or policy == "exact" or (policy == "carried" and kept.moments):
        return policy, kept
    reason = {
        "carried": "",
        "reset": "every moment and the step count start at zero by choice",
        "asymmetric": "moments of fresh entries start at zero by choice",
    }[policy]
    return (policy, kept + Exactness(moments=(reason,))) if reason else (own, kept)


def _layers(pair: Pair, text: str) -> dict[str, list[Layer]]:
    operator, options = parse_operator(text, "depth")
    found = {}
    for axis in pair.table.depth:
        rows = operator.make(pair, pair.small[axis], pair.large[axis], **options)
        found[axis] = [row if isinstance(row, Layer) else Layer(row) for row in rows]
        if len(found[axis]) != pair.large[axis]:
            raise UnsupportedGrowth(
                f"--depth {text} makes {len(found[axis])} layers of {pair.small[axis]}; the target config says "
                f"{pair.table.key(axis)}={pair.large[axis]}: set it to {len(found[axis])}, or use --depth stack"
            )
    return found


def pair_of(
    table: Table,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    operator: Operator,
    extra: Mapping[str, str | None],
    seed: int,
    heads: frozenset[str] = frozenset(),
) -> Pair:
    """The two models of a growth by this operator. Raises UnsupportedGrowth, InvalidConfig."""
    small, large = table.axis_sizes(source), table.axis_sizes(target)
    check_labels(table, source, target, heads)
    large["labels"] = small["labels"]  # the same, or no head's
    for whose, config, layers in (("source", source, small["layers"]), ("target", target, large["layers"])):
        kinds = config.get(table.kinds) if table.kinds else None
        many = len(kinds) if isinstance(kinds, list) else 0
        if kinds is not None and many != layers:
            raise InvalidConfig(
                f"{whose} config: {table.kinds} tells the kinds of {many} layers, and there are {layers}; list one "
                f"kind a layer, or leave {table.kinds} out"
            )
    derived = {axis for axis in ("qk", "v") if table.key(axis) == table.key("embed")}
    for axis in table.sizes:
        key = table.key(axis)
        if axis == "group" and large[axis] < small[axis]:
            keys = key, table.key("kv")
            raise UnsupportedGrowth(
                f"target {keys[0]}={target.get(keys[0])} over {large['kv']} key-value heads makes groups of "
                f"{large[axis]}, the source's are of {small[axis]}; a growth cannot shrink them: set {keys[0]} to at "
                f"least {small[axis] * large['kv']}, or {keys[1]} lower"
            )
        if large[axis] < small[axis] and axis not in derived:
            raise UnsupportedGrowth(
                f"target {key}={target.get(key, large[axis])} is smaller than the source's "
                f"{source.get(key, small[axis])} (axis {axis}: {large[axis]} of {small[axis]}); a growth "
                f"cannot shrink: choose a target at least as large on every axis, or --width coalesce --depth coalesce"
            )
    for axis, reason in table.fixed.items():
        if large[axis] != small[axis]:
            raise UnsupportedGrowth(f"{table.key(axis)} would change from {small[axis]} to {large[axis]}: {reason}")
    for kind, axis in EXTRA.items():
        grows = axis in table.sizes and large[axis] != small[axis]
        if extra[kind] is not None:
            _check_extra(table, kind, str(extra[kind]), grows, operator)
        elif grows and operator.name != "random":
            known = " | ".join(name for name in OPERATORS[kind] if name != "upcycle")
            raise UnsupportedGrowth(
                f"target {table.key(axis)}={large[axis]}, source {small[axis]}: choose how it grows with --{kind} "
                f"{known}, or set it to {small[axis]} in the target config"
            )
    if "types" in table.sizes and large["types"] != small["types"]:
        raise UnsupportedGrowth(
            f"target {table.key('types')}={large['types']}, source {small['types']}: no operator grows it; "
            f"set it to {small['types']} in the target config"
        )
    smaller = large["qk"] < small["qk"] and operator.name != "random"
    if large["qk"] != small["qk"] and (smaller or not operator.head_size):
        raise UnsupportedGrowth(
            f"the head size would change from {small['qk']} to {large['qk']} "
            f"(width {large['embed']} over {large.get('heads', 0)} heads): "
            + ("a growth cannot shrink heads.\n" if smaller else f"--width {operator.name} copies whole heads.\n")
            + f"Set {table.key('heads')}={large['embed'] // small['qk']} in the target config"
            + ("" if large["embed"] % small["qk"] == 0 else f" and a width that {small['qk']} divides")
            + ("." if smaller else ", or use --width hyperclone or gesmundo, which grow heads.")
        )
    theirs = table.settled(target, heads)
    for key, a in table.settled(source, heads).items():
        if extra["experts"] and key == "num_experts_per_tok":
            continue  # which copies may change: the operator says what that does
        if a != (b := theirs.get(key, a)) and not (key in _UNSAID and None in (a, b)):
            raise UnsupportedGrowth(
                f"{key} is {a!r} in the source and {b!r} in the target config; a growth cannot change it: "
                f"set {key} to {a!r} in the target config"
            )
    return Pair(table, source, target, small, large, seed, heads)
