"""Which variants of tests.tiny tell everything apart, computed from the tables.

A law for every family is tested on a cover: the fewest variants, found greedily, that show every fact that any variant
shows (`facts`). The others are marked ``full`` and run with ``--full`` alone. A new row, tie, unit or kind of layer in
a table brings the variant that has it into the cover. So that every row of every table is tried, one law of width and
moments runs on all variants: tests/laws/test_families.py::test_the_gradient_rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pytest

from bert2bert.algebra import axes
from bert2bert.tables import table_for
from tests import tiny


@cache
def facts(name: str) -> frozenset[tuple[Any, ...]]:
    """What an operator or a plan can see of a variant: axes, what each tensor does with them, norms, units."""
    config = tiny.config_of(name)
    table, (cls,) = table_for(config), config["architectures"]
    heads, sizes = table.names.classes[cls], table.axis_sizes(config)
    parameters = table.parameters(config, heads)
    layers = {depth: range(sizes[depth]) for depth in table.sizes.depth}
    found: set[tuple[Any, ...]] = {
        ("norm", table.norms.kind, table.norms.pre, table.norms.axes),
        ("head", table.tied(config), len(table.sizes.depth), table.norms.kind, table.norms.pre),
        ("heads", heads, table.norms.kind, table.norms.pre, len(table.sizes.depth)),
        ("depth", table.sizes.depth),
        ("kinds", len({table.layer_kind(config, i) for i in layers["layers"]}), bool(table.compatible.every[0])),
        ("first position", table.sizes.first_position),
        ("dense", bool(table.compatible.dense)),
        *(("axis", axis) for axis in sizes),
        *(("follows", axis, of) for axis, of in table.sizes.follows.items()),
        *(("scale", axis, of) for axis, of in table.sizes.scales.items()),
        *(("unit", axis, axis in table.sizes.aligned, sizes[axis] == 1) for axis in table.sizes.units),
        *(("size of its own", axis, table.key(axis) != table.key("embed")) for axis in ("qk", "v")),
        *(("fixed", axis) for axis in table.sizes.fixed),
        *(("std", product) for product in table.stds.values()),
    }
    for p in parameters.values():
        norm = (table.norms.kind, table.norms.pre) if "rho" in axes.axes_of(p.spec) else ()
        found.add(("spec", p.spec, p.depth, p.decay, p.part == "unused", *norm))
        if p.layer is not None:
            found.add(("some layers", p.spec, all(p.at(layer) in parameters for layer in layers[p.depth])))
    return frozenset(found)


def cover(shown: Mapping[str, frozenset[Any]]) -> list[str]:
    """The names, the most telling first, that show together all that any name shows."""
    chosen, left = [], frozenset().union(*shown.values())
    while left:
        best = max(shown, key=lambda name: len(shown[name] & left))
        chosen.append(best)
        left -= shown[best]
    return chosen


def families(names: Iterable[str] = tiny.VARIANTS) -> list[Any]:
    """The variants as parameters of a test; those outside the cover of the given ones are marked ``full``."""
    every = sorted(names)
    covering = cover({name: facts(name) for name in every})
    return [name if name in covering else pytest.param(name, marks=pytest.mark.full) for name in every]
