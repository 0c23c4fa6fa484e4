"""What a table of an architecture holds, and what follows from one and a config: names, specs, shapes, ties.

A row's name may hold ``{weight,bias}`` (two tensors: the bias has the written dims of the spec alone) and ``{layers}``.
Refuses configs that lack a size or whose heads do not divide the width (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bert2bert import axes
from bert2bert.errors import InvalidConfig


@dataclass(frozen=True)
class Row:
    """One line of a table: name pattern, spec, the head it ``needs``, and whether only ``tied`` embeddings have it."""

    name: str
    spec: str
    needs: str = ""
    tied: bool | None = None


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model: its spec, shape and layer (None outside the layers); ``pattern`` is its row's name."""

    name: str
    spec: str
    shape: tuple[int, ...]
    layer: int | None
    pattern: str


@dataclass(frozen=True)
class Table:
    """One architecture.

    outer: the name prefix of the base model inside the full one; anchor: a tensor that every variant has, less outer.
    classes: transformers class -> heads; sizes: axis -> config key; head_axes: axes of the head size, width / heads.
    normalised: axes that a norm renormalises; units: axes whose features are whole units (heads, neurons).
    must_agree: config keys that a growth cannot change -> their defaults; ties: absent tied name -> kept name;
    defaults: axis -> its size where a config is silent, as transformers has it.
    """

    model_type: str
    outer: str
    anchor: str
    classes: Mapping[str, frozenset[str]]
    sizes: Mapping[str, str]
    head_axes: tuple[str, ...]
    constants: Mapping[str, int]
    normalised: frozenset[str]
    units: tuple[str, ...]
    must_agree: Mapping[str, Any]
    rows: tuple[Row, ...]
    ties: Mapping[str, str]
    defaults: Mapping[str, int] = field(default_factory=dict)

    def axis_sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The size of every axis under a config. Raises InvalidConfig."""
        sizes = dict(self.constants)
        for axis, key in self.sizes.items():
            if key not in config and axis not in self.defaults:
                raise InvalidConfig(f"model config: {key} is missing; a positive integer is expected")
            value = config.get(key, self.defaults.get(axis))
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidConfig(f"model config: {key} is {value!r}; a positive integer is expected")
            sizes[axis] = value
        if sizes["embed"] % sizes["heads"]:
            raise InvalidConfig(
                f"model config: {self.sizes['heads']}={sizes['heads']} does not divide "
                f"{self.sizes['embed']}={sizes['embed']}; choose a number of heads that does"
            )
        return sizes | dict.fromkeys(self.head_axes, sizes["embed"] // sizes["heads"])

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the decoder is the word embedding (transformers' default)."""
        return bool(config.get("tie_word_embeddings", True))

    def parameters(self, config: Mapping[str, Any], heads: frozenset[str]) -> dict[str, Parameter]:
        """Every parameter by its full name, in the order of the table; tied copies are left out."""
        sizes, tied = self.axis_sizes(config), self.tied(config)
        rows = [r for r in self.rows if (not r.needs or r.needs in heads) and r.tied in (None, tied)]
        first, last = _span(rows)
        found: dict[str, Parameter] = {}
        for row in rows[:first]:
            found.update(_expand(row, None, sizes))
        for layer in range(sizes["layers"]):
            for row in rows[first:last]:
                found.update(_expand(row, layer, sizes))
        for row in rows[last:]:
            found.update(_expand(row, None, sizes))
        return found

    def aliases(self, config: Mapping[str, Any], heads: frozenset[str]) -> dict[str, str]:
        """Absent tied name -> kept name, for the heads present."""
        return dict(self.ties) if self.tied(config) and "mlm" in heads else {}


def _span(rows: list[Row]) -> tuple[int, int]:
    layered = [i for i, row in enumerate(rows) if "{layers}" in row.name]
    return (layered[0], layered[-1] + 1) if layered else (len(rows), len(rows))


def _expand(row: Row, layer: int | None, sizes: Mapping[str, int]) -> Iterator[tuple[str, Parameter]]:
    pattern = row.name
    place = pattern if layer is None else pattern.replace("{layers}", str(layer))
    if "{weight,bias}" not in pattern:
        yield place, Parameter(place, row.spec, axes.shape(row.spec, sizes), layer, pattern)
        return
    for kind in ("weight", "bias"):
        spec = row.spec if kind == "weight" else row.spec.split("<-")[0].strip()
        name = place.replace("{weight,bias}", kind)
        yield name, Parameter(name, spec, axes.shape(spec, sizes), layer, pattern.replace("{weight,bias}", kind))
