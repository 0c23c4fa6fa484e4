"""Growths as values in Python: ``then(stack(2), fpi(embed=768)).plan(config)``.

A step knows no model: it says which operators with which options, and how large the model becomes, by axis or by a
factor. Given the config of a model it gives the config that it grows into, and the plan. See `bert2bert.growths`.

Refuses sizes that the step's operators do not grow, and sizes that are not whole numbers (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth import compose
from bert2bert.growth.choices import EXTRA, KINDS, Choices
from bert2bert.growth.plan import plan_growth
from bert2bert.operators.registry import OPERATORS, Chosen, parse_operator
from bert2bert.tables import Table, table_for

Config = Mapping[str, Any]
_AXES = {"width": "embed", **EXTRA}
"""Kind of operator -> the axis that a factor multiplies (depth: every stack of layers)."""


class Step(Protocol):
    """Any growth. leaves: how many checkpoints it starts from; as many configs are given, in their order."""

    @property
    def leaves(self) -> int: ...

    def config(self, *sources: Config) -> dict[str, Any]:
        """The config of the model that it grows into."""

    def plan(self, *sources: Config) -> GrowthPlan:
        """The plan of the growth."""


@dataclass(frozen=True)
class Growth:
    """One growth; without operators, a checkpoint as it is.

    The sizes that it grows into are those of ``sizes``, of ``factor`` or of ``to``.
    """

    operators: Mapping[str, Chosen] = field(default_factory=dict)
    """By kind."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """By axis."""
    factor: float = 1.0
    """On the sizes of width and depth (of the other kinds, where only they are named)."""
    to: Config | None = None
    """The config to grow into."""
    choices: Choices = field(default_factory=Choices.parse)
    """Seed, symmetry breaker and moments; its operators are the defaults, where ``operators`` names none."""
    leaves: int = field(default=1, init=False)

    def config(self, *sources: Config) -> dict[str, Any]:
        """The source's config with the step's sizes. Raises InvalidConfig, UnsupportedGrowth."""
        (source,) = _as_many(sources, 1)
        if self.to is not None:
            return dict(self.to)
        table = table_for(source)
        sizes = self._factored(table, source)
        if twice := sizes.keys() & self.sizes.keys():
            raise InvalidConfig(
                f"{self._names()}: a factor of {self.factor:g} and {', '.join(sorted(twice))} "
                f"are both given; leave one of them out"
            )
        sizes |= self.sizes
        for axis in sizes:
            if axis in table.sizes.axes and (kind := _kind(table, axis)) not in self.operators:
                raise InvalidConfig(
                    f"{self._names() or 'no operator'} does not grow {axis}, which is a matter of "
                    f"{kind}; take one more step with a {kind} operator, or growths.grow({kind}=…, {axis}=…)"
                )
        return _with_kinds(table, source, table.resize(source, sizes)) if sizes else dict(source)

    def plan(self, *sources: Config) -> GrowthPlan:
        """The plan for a model with this config. Raises InvalidConfig, UnsupportedGrowth."""
        (source,) = _as_many(sources, 1)
        target = self.config(source)
        table = table_for(target)
        old, new = table_for(source).axis_sizes(source), table.axis_sizes(target)
        grown = {_kind(table, axis) for axis in table.sizes.axes if old.get(axis) != new[axis]}
        used: dict[str, Any] = {k: one for k, one in self.operators.items() if k in grown or len(self.operators) == 1}
        return plan_growth(source, target, replace(self.choices, **used))

    def _names(self) -> str:
        return ", ".join(map(str, self.operators.values()))

    def _factored(self, table: Table, source: Config) -> dict[str, int]:
        old, sizes = table.axis_sizes(source), dict[str, int]()
        if self.factor == 1.0:
            return sizes
        for kind in {"width", "depth"} & self.operators.keys() or self.operators:
            for axis in table.sizes.depth if kind == "depth" else (_AXES[kind],):
                size = old.get(axis, 0) * self.factor
                if size != round(size) or size < 1:
                    raise InvalidConfig(
                        f"{self.operators[kind]}: {self.factor:g} times {axis}={old.get(axis, 'none here')} is not a "
                        "whole number; choose another factor, or give the size of an axis: "
                        f"{', '.join(table.sizes.axes)}"
                    )
                sizes[axis] = round(size)
        return sizes


@dataclass(frozen=True)
class Then:
    """Steps one after the other, in one pass over the checkpoint."""

    first: Step
    second: Step

    @property
    def leaves(self) -> int:
        return self.first.leaves

    def config(self, *sources: Config) -> dict[str, Any]:
        """What the second step makes of the config that the first one grows into."""
        return self.plan(*sources).config

    def plan(self, *sources: Config) -> GrowthPlan:
        """Both as one plan. Raises InvalidConfig, UnsupportedGrowth."""
        first = self.first.plan(*sources)
        return compose.then(first, self.second.plan(first.config))


@dataclass(frozen=True)
class Interpolate:
    """(1 - alpha) of what the first step makes and alpha of what the second makes."""

    a: Step
    b: Step
    alpha: float

    @property
    def leaves(self) -> int:
        return self.a.leaves + self.b.leaves

    def config(self, *sources: Config) -> dict[str, Any]:
        """The config of the first step's model; the second step's must have the same sizes."""
        return self.a.config(*_as_many(sources, self.leaves)[: self.a.leaves])

    def plan(self, *sources: Config) -> GrowthPlan:
        """Both as one plan, the checkpoints of the first step first. Raises InvalidConfig, UnsupportedGrowth."""
        configs = _as_many(sources, self.leaves)
        mine, theirs = configs[: self.a.leaves], configs[self.a.leaves :]
        return compose.interpolate(self.a.plan(*mine), self.b.plan(*theirs), self.alpha)


def then(first: Step, second: Step, *more: Step) -> Step:
    """One growth after the other, in one pass, bit for bit what they give in sequence.

    Raises UnsupportedGrowth for a later step that starts from several checkpoints.
    """
    if any(step.leaves > 1 for step in (second, *more)):
        raise UnsupportedGrowth("a mean of two models can only come first in a sequence: interpolate, then the rest")
    return reduce(Then, _flat(second, *more), first)


def interpolate(a: Step, b: Step, alpha: float) -> Step:
    """(1 - alpha) a + alpha b. ``plan`` takes the configs of the checkpoints of ``a``, then of ``b``."""
    return Interpolate(a, b, alpha)


def grow(to: Config | None = None, /, *, seed: int = 0, breaker: str | None = None, moments: str | None = None,
         **given: Any) -> Step:  # fmt: skip
    """One growth by any operators: ``grow(width="aki", depth="stack", embed=768, layers=12)``.

    to: a config to grow into. given: operators by kind, as on the command line, and sizes by axis; without any of
    these, a checkpoint as it is.
    """
    operators = {kind: parse_operator(given.pop(kind), kind) for kind in KINDS if kind in given}
    choices = Choices.parse(seed=seed, breaker=breaker, moments=moments)
    return Growth(operators, _sizes(given), to=to, choices=choices)


def named(name: str, size: float | Config = 1.0, /, *, seed: int = 0, breaker: str | None = None,
          moments: str | None = None, **given: Any) -> Step:  # fmt: skip
    """One growth by the operators of this name, of every kind that has one. size: a factor on what they grow (operators
    that shrink: its divisor), or the config to grow into. given: options of the operators, and sizes by axis.

    Raises InvalidConfig for unknown options and sizes.
    """
    found = {kind: OPERATORS[kind][name] for kind in KINDS if name in OPERATORS[kind]}
    options = {key: value for key, value in given.items() if any(key in o.options for o in found.values())}
    operators = {}
    for kind, one in found.items():
        text = ",".join(f"{key}={value}" for key, value in options.items() if key in one.options)
        operators[kind] = parse_operator(f"{name}:{text}" if text else name, kind)
    to = size if isinstance(size, Mapping) else None
    factor = 1.0 if isinstance(size, Mapping) else float(size)
    if not 0 < factor < float("inf"):
        raise InvalidConfig(f"{name}({size!r}): a positive factor is expected")
    if any(one.shrinks for one in found.values()):
        factor = 1.0 / factor
    sizes = _sizes({key: value for key, value in given.items() if key not in options})
    return Growth(operators, sizes, factor, to, Choices.parse(seed=seed, breaker=breaker, moments=moments))


def replan(recipe: Mapping[str, Any], target: Config, *sources: Config) -> GrowthPlan:
    """The plan that a recipe stored with a grown checkpoint describes. sources: the configs of the checkpoints that it
    was grown from. Raises UnsupportedGrowth, InvalidConfig; KeyError for a sequence of growths, which stores no configs
    in between."""
    if "interpolate" in recipe:
        a, b = recipe["interpolate"]
        return compose.interpolate(replan(a, target, sources[0]), replan(b, target, sources[1]), recipe["alpha"])
    return plan_growth(sources[0], target, Choices.of_recipe(recipe), heads=frozenset(recipe["heads"]))


def _flat(*steps: Step) -> list[Step]:
    """Sequences opened up, for only the first growth of a sequence may rest on others."""
    return [part for s in steps for part in (_flat(s.first, s.second) if isinstance(s, Then) else [s])]


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    for axis, size in given.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidConfig(f"{axis}={size!r} is neither an option of the operator nor the size of an axis")
    return dict(given)


def _with_kinds(table: Table, source: Config, resized: dict[str, Any]) -> dict[str, Any]:
    """With one kind of layer (attention pattern) for each layer: by the model's period, or the list over again."""
    key = table.compatible.kinds
    kinds = source.get(key) if key else None
    if not kinds or (many := table.axis_sizes(resized)["layers"]) == len(kinds):
        return resized
    free = {**source, key: None}
    periodic = [table.layer_kind(free, i) for i in range(len(kinds))] == list(kinds)
    resized[key] = [table.layer_kind(free, i) if periodic else kinds[i % len(kinds)] for i in range(many)]
    return resized


def _kind(table: Table, axis: str) -> str:
    """The kind of operator that grows an axis."""
    return "depth" if axis in table.sizes.depth else next((kind for kind, of in _AXES.items() if of == axis), "width")


def _as_many(sources: tuple[Config, ...], expected: int) -> tuple[Config, ...]:
    if len(sources) != expected:
        raise InvalidConfig(f"this growth starts from {expected} checkpoints, and {len(sources)} configs were given")
    return sources
