"""What a growth within an architecture refuses before it is planned, each with what would work.

`UnsupportedGrowth`: a smaller target, another head size where an operator copies whole heads, settings that a growth
cannot change, sizes that no operator was chosen for. `InvalidConfig`: operators that would do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.choices import EXTRA, Choices
from bert2bert.operators.decisions import Pair, check_labels
from bert2bert.operators.registry import OPERATORS, Chosen
from bert2bert.tables import TABLES, table_for

_UNSET = ("pad_token_id", "max_position_embeddings")  # null does not say what the function is; a null window does

_UNTIE = ", or copy the tied matrix into an output matrix of its own with --embeddings untie"


def pair_of(
    source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str] = frozenset()
) -> Pair:
    """The two models of a growth within an architecture. Raises UnsupportedGrowth, InvalidConfig."""
    table = table_for(source)
    small, large = table.axis_sizes(source), table.axis_sizes(target)
    check_labels(table, source, target, heads)
    large["labels"] = small["labels"]  # the same, or no head has them
    pair = Pair(table, source, target, small, large, choices.seed, heads)
    _check_kinds(pair)
    _check_not_smaller(pair)
    _check_fixed(pair)
    _check_chosen(pair, choices)
    _check_types(pair)
    _check_head_size(pair, choices.width)
    _check_settings(pair, choices)
    return pair


def _check_kinds(pair: Pair) -> None:
    """One kind a layer, where a config lists them."""
    key = pair.table.compatible.kinds
    for whose, config, sizes in (("source", pair.source, pair.small), ("target", pair.target, pair.large)):
        kinds = config.get(key) if key else None
        many = len(kinds) if isinstance(kinds, list) else 0
        if kinds is not None and many != sizes["layers"]:
            raise InvalidConfig(
                f"{whose} config: {key} lists the kinds of {many} layers, and there are {sizes['layers']}; list one "
                f"kind a layer, or leave {key} out"
            )


def _check_not_smaller(pair: Pair) -> None:
    table, small, large, target = pair.table, pair.small, pair.large, pair.target
    derived = {axis for axis in ("qk", "v") if table.key(axis) == table.key("embed")}
    for axis in table.sizes.axes:
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
                f"{pair.source.get(key, small[axis])} (axis {axis}: {large[axis]} of {small[axis]}); a growth "
                f"cannot shrink: choose a target at least as large on every axis, or --width coalesce --depth coalesce"
            )


def _check_fixed(pair: Pair) -> None:
    for axis, reason in pair.table.sizes.fixed.items():
        if pair.large[axis] != pair.small[axis]:
            raise UnsupportedGrowth(
                f"{pair.table.key(axis)} would change from {pair.small[axis]} to {pair.large[axis]}: {reason}"
            )


def _check_chosen(pair: Pair, choices: Choices) -> None:
    """An operator for tokens, positions and experts where these grow, and only there."""
    table, extra = pair.table, choices.extra
    for kind, axis in EXTRA.items():
        grows = axis in table.sizes.axes and pair.large[axis] != pair.small[axis]
        if kind in extra:
            _check_extra(pair, extra[kind], axis, grows, choices.width)
        elif grows and choices.width.operator.name != "random":
            known = " | ".join(name for name in OPERATORS[kind] if name != "upcycle")
            raise UnsupportedGrowth(
                f"target {table.key(axis)}={pair.large[axis]}, source {pair.small[axis]}: choose how it grows with "
                f"--{kind} {known}, or set it to {pair.small[axis]} in the target config"
            )


def _check_extra(pair: Pair, chosen: Chosen, axis: str, grows: bool, width: Chosen) -> None:
    """Refuse an operator on tokens, positions or experts that would do nothing."""
    table, kind = pair.table, chosen.operator.kind
    if axis not in table.sizes.axes and kind == "positions":
        raise UnsupportedGrowth(
            f"{chosen.flag}: a {table.model_type} has no table of positions (they are rotary, or relative distances), "
            f"so a longer context needs no operator; leave --positions out"
        )
    if axis not in table.sizes.axes:
        fit = " or ".join(t.model_type for t in TABLES.values() if table.model_type in t.compatible.dense_types)
        remedy = (
            f"a llama, mistral or qwen3 can be upcycled, and a mixture of experts can have more; leave --{kind} out"
        )
        if fit:
            remedy = f"--experts upcycle makes a {fit} of it: give a target config of that"
        raise UnsupportedGrowth(f"{chosen.flag}: a {table.model_type} has no experts; {remedy}")
    if chosen.operator.name == "upcycle":
        raise UnsupportedGrowth(
            f"{chosen.flag}: the source is a mixture of experts already, and upcycle starts from a dense model; use "
            f"--experts duplicate"
        )
    if not grows:
        raise InvalidConfig(
            f"{chosen.flag}: {table.key(axis)} is the same in source and target, so there is nothing to make; leave "
            f"--{kind} out, or set a larger {table.key(axis)} in the target config"
        )
    check_not_random(chosen, width)


def check_not_random(chosen: Chosen, width: Chosen) -> None:
    """Refuse (InvalidConfig) an operator beside a width that copies nothing."""
    if width.operator.name == "random":
        dense = chosen.operator.name == "upcycle"
        raise InvalidConfig(
            f"{chosen.flag} with --width random, which copies nothing of the source; leave "
            f"--{chosen.operator.kind} out" + (", and train the mixture of experts from scratch" if dense else "")
        )


def check_layers(pair: Pair, depth: Chosen, axis: str) -> None:
    """Refuse (UnsupportedGrowth) to copy layers of a stack that has none."""
    if pair.large[axis] and not pair.small[axis] and depth.operator.name != "random":
        raise UnsupportedGrowth(
            f"{depth.flag}: the source has {pair.table.key(axis)}=0, so there is no layer to copy; use --depth random, "
            f"whose layers are drawn as for training from scratch, or --depth random:residual=zero, which keeps the "
            f"function of a pre-norm model"
        )


def check_alone(width: Chosen, depth: Chosen, moments: str | None) -> None:
    """Refuse (UnsupportedGrowth) what cannot go with an operator that mixes features and layers."""
    if depth.text != "stack":
        raise UnsupportedGrowth(
            f"{depth.flag} with --width {width.operator.name}, which covers the depth: leave it out"
        )
    if moments not in (None, "reset"):
        raise UnsupportedGrowth(
            f"--moments {moments} with --width {width.operator.name}: the second moment of a sum of features or layers "
            f"is not determined by those of its summands, so every moment starts at zero; leave the option out, or "
            f"give reset"
        )


def _check_types(pair: Pair) -> None:
    table = pair.table
    if "types" in table.sizes.axes and pair.large["types"] != pair.small["types"]:
        raise UnsupportedGrowth(
            f"target {table.key('types')}={pair.large['types']}, source {pair.small['types']}: no operator grows it; "
            f"set it to {pair.small['types']} in the target config"
        )


def _check_head_size(pair: Pair, width: Chosen) -> None:
    """Another size of a head only with an operator that grows it; a smaller one only where nothing is copied."""
    small, large, table = pair.small["qk"], pair.large["qk"], pair.table
    smaller = large < small and width.operator.name != "random"
    if large == small or (width.operator.head_size and not smaller):
        return
    embed = pair.large["embed"]
    why = "a growth cannot shrink heads." if smaller else f"--width {width.operator.name} copies whole heads."
    raise UnsupportedGrowth(
        f"the head size would change from {small} to {large} (width {embed} over {pair.large.get('heads', 0)} heads): "
        f"{why}\nSet {table.key('heads')}={embed // small} in the target config"
        + ("" if embed % small == 0 else f" and a width that {small} divides")
        + ("." if smaller else ", or use --width hyperclone or gesmundo, which grow heads.")
    )


def _check_settings(pair: Pair, choices: Choices) -> None:
    """What no growth can change: keys that decide the function, but none of the sizes."""
    theirs = pair.table.settled(pair.target, pair.heads)
    for key, a in pair.table.settled(pair.source, pair.heads).items():
        if choices.experts and key == "num_experts_per_tok":
            continue  # which copies may change: the operator says what that does
        if a != (b := theirs.get(key, a)) and not (key in _UNSET and None in (a, b)):
            raise UnsupportedGrowth(
                f"{key} is {a!r} in the source and {b!r} in the target config; a growth cannot change it: "
                f"set {key} to {a!r} in the target config" + (_UNTIE if key == "tie_word_embeddings" and a else "")
            )
