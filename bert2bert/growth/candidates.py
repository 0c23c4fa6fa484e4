"""Which operators make one model of another, and what each keeps: asked of their own plans. Reads no tensor.

Every kind of size that changes (width, depth, vocabulary, positions, experts) is planned by itself, between models that
differ in it alone, so that an answer is about one operator; and so are embeddings that are tied no longer. Where layers
do not matter, a few of them are planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import UnsupportedGrowth, UserError
from bert2bert.growth.choices import EXTRA, Choices
from bert2bert.growth.plan import plan_growth
from bert2bert.growth.resize import with_sizes
from bert2bert.operators.registry import FLAGS, OPERATORS, Operator
from bert2bert.tables import table_for

_FEW = 4  # layers
_ONLY_EXACT = ("hyperclone", "lemon", "gesmundo", "insert_identity")  # others learn more where nothing is exact
_BEST = {  # kind -> the operators that are proposed, the best first: exact ones, then the first that works
    "width": ("hyperclone", "lemon", "gesmundo", "aki", "fpi", "coalesce", "shrink"),
    "depth": ("insert_identity", "stack", "coalesce", "shrink"),
    "vocab": ("mean",),
    "positions": ("tile",),
    "experts": ("duplicate",),
    "embeddings": ("untie",),
}


@dataclass(frozen=True)
class Candidate:
    """One operator for one kind of size. reasons: why the function changes, none: it does not; refused: why it cannot
    make this model, "" if it can."""

    name: str
    reasons: tuple[str, ...] = ()
    refused: str = ""

    @property
    def exact(self) -> bool:
        """Whether it keeps the function."""
        return not self.reasons and not self.refused


@dataclass(frozen=True)
class Proposal:
    """Operators that make the model, as ``grow`` takes them, and the plan's reasons why the function changes."""

    options: tuple[str, ...]
    reasons: tuple[str, ...]


def candidates(
    source: Mapping[str, Any], target: Mapping[str, Any], heads: frozenset[str]
) -> dict[str, list[Candidate]]:
    """Kind of what changes -> its operators. heads: of the source. Raises InvalidConfig, UnsupportedGrowth."""
    table = table_for(source)
    old, new = table.axis_sizes(source), table.axis_sizes(target)
    changed = [axis for axis in table.sizes.axes if old[axis] != new[axis]]
    few = {axis: min(_FEW, old[axis]) for axis in table.sizes.depth if axis in old}
    kinds: dict[str, list[str]] = {}
    for axis in changed:
        if axis not in ("qk", "v"):
            kinds.setdefault(_kind(axis, table.sizes.depth), []).append(axis)
    found: dict[str, list[Candidate]] = {}
    if table.tied(source) and not table.tied(target):
        tied, apart = with_sizes(source, few), {"tie_word_embeddings": False}
        operators = list(OPERATORS["embeddings"].values())
        found["embeddings"] = [_asked(operator, tied, {**tied, **apart}, heads) for operator in operators]
        source = {**source, **apart}
    for kind, axes in sorted(kinds.items(), key=lambda item: list(_BEST).index(item[0])):
        small = source if kind == "depth" else with_sizes(source, few)
        if kind == "width":
            others = {axis: old[axis] for axis in (*EXTRA.values(), "types") if axis in changed}
            large = with_sizes(target, few | others)
        else:
            large = with_sizes(small, {axis: new[axis] for axis in axes})
        smaller = any(new[axis] < old[axis] for axis in axes)
        operators = [o for o in OPERATORS.get(kind, {}).values() if o.shrinks == smaller]
        found[kind] = [_asked(operator, small, large, heads) for operator in operators]
    return found


def _kind(axis: str, depth: tuple[str, ...]) -> str:
    if axis in depth:
        return "depth"
    return next((kind for kind, own in EXTRA.items() if own == axis), "width")


def _asked(operator: Operator, small: Mapping[str, Any], large: Mapping[str, Any], heads: frozenset[str]) -> Candidate:
    if missing := [key for key, (_, default) in operator.options.items() if default is None]:
        return Candidate(operator.name, refused=f"needs {', '.join(f'{key}=…' for key in missing)}")
    try:
        plan = _plan(small, large, heads, {operator.kind: operator.name})
    except UserError as error:
        return Candidate(operator.name, refused=str(error).splitlines()[0])
    return Candidate(operator.name, plan.exactness.function)


def _plan(
    source: Mapping[str, Any], target: Mapping[str, Any], heads: frozenset[str], how: Mapping[str, Any]
) -> GrowthPlan:
    return plan_growth(source, target, Choices.parse(**how), heads=heads, optimizer=False)


def proposal(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    heads: frozenset[str],
    known: Mapping[str, list[Candidate]],
) -> Proposal:
    """The best operator of each kind, together. known: as `candidates` gives them. Raises UserError where a kind has no
    operator, or the plan of the whole is refused."""
    how = {kind: _best(kind, found) for kind, found in known.items()}
    width = how.get("width")
    if width is not None and OPERATORS["width"][width].copies and width != "lemon":
        how["breaker"] = "noise"
    try:
        plan = _plan(source, target, heads, how)
    except UserError:
        if how.pop("breaker", None) is None:
            raise
        plan = _plan(source, target, heads, how)
    options = [word for kind, name in how.items() for word in (FLAGS[kind], name)]
    return Proposal((*options, *["--lossy"] * bool(plan.exactness.lossy)), plan.exactness.function)


def _best(kind: str, found: list[Candidate]) -> str:
    """The operator to propose. Raises UnsupportedGrowth with the first refusal where there is none."""
    usable = {candidate.name: candidate for candidate in found if not candidate.refused}
    ranked = [name for name in _BEST.get(kind, ()) if name in usable]
    exact = [name for name in ranked if usable[name].exact]
    if exact or ranked or usable:
        return (exact or [name for name in ranked if name not in _ONLY_EXACT] or list(usable))[0]
    raise UnsupportedGrowth(found[0].refused if found else f"no operator makes a model with fewer of {kind}")
