"""The table of an architecture, and what follows from it and a config: sizes, parameters by name, ties.

What a table states is in `description`, how its strings are read in `expressions`.
Refuses configs that lack a size, or whose sizes do not divide where they must (`InvalidConfig`), and settings that the
rows do not describe (`UnsupportedGrowth`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from bert2bert.algebra import axes
from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.expressions import (
    asks,
    deviation,
    evaluate,
    holds,
    numbered,
    present,
    products,
    referred,
    weight_and_bias,
)
from bert2bert.tables.rope import rotary

_LM = "lm"  # the language-model head


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model."""

    name: str
    """As the full model names it."""
    spec: str
    """Its axes; a bias has the written ones of its row alone."""
    shape: tuple[int, ...]
    """Under the config."""
    layer: int | None
    """None outside the layers."""
    pattern: str
    """Its row's name, with weight or bias filled in."""
    depth: str
    """The axis that numbers the layer, '' outside the layers."""
    part: str
    """Of the network, with which it learns: 'embeddings', 'head', 'unused', or 'layer.3' ('decoder_layer.3')."""
    decay: bool
    """Whether weight decay applies, as transformers' Trainer has it."""

    def at(self, layer: int | None) -> str:
        """The name of the same tensor in another layer."""
        return numbered(self.pattern, layer)


@dataclass(frozen=True)
class Table:
    """One architecture: its rows, and what is known of them in four parts, each with its fields.

    The rows are the table itself, what most readers look for, and a fresh weight's deviation belongs to a row: both
    are here. So is every method, because each reads several parts, or names the model in its errors.
    """

    model_type: str
    """The config's model_type."""
    rows: tuple[Row, ...]
    """The parameters, in the order of the model."""
    names: Names
    """Transformers' classes, prefixes and tied tensors."""
    sizes: Sizes
    """The named axes."""
    norms: Norms
    """The normalisations."""
    compatible: Compatibility
    """Which configs are described, and which models and layers may be joined."""
    stds: Mapping[str, str] = field(default_factory=dict)
    """The end of a row's name -> the *std* of a fresh weight; others take initializer_range, see `std`."""

    def key(self, axis: str) -> str:
        """The config key to change for another size of an axis."""
        axis = self.sizes.follows.get(axis, axis)
        found = products(self.sizes.axes[axis])[0][0].name
        return self.key(found) if found in self.sizes.axes and found != axis else found

    def axis_sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The size of every axis under a config. Raises InvalidConfig, UnsupportedGrowth."""
        for key, value in self.compatible.requires.items():
            if (found := config.get(key, value)) != value:
                raise UnsupportedGrowth(
                    f"model config: {key} is {found!r}; a {self.model_type} is described only with {key}={value!r}"
                )
        key, divisor = self.sizes.multiples.get(self.model_type, ("", ""))
        whole, part = config.get(key), config.get(divisor)
        if isinstance(whole, int) and isinstance(part, int) and part > 0 and whole % part:
            raise InvalidConfig(
                f"model config: {key}={whole} is not a multiple of {divisor}={part}, without which transformers makes "
                f"no {self.model_type}; choose sizes that divide"
            )
        sizes = dict(self.sizes.constants)
        for axis, size in self.sizes.axes.items():
            least = self.sizes.shallowest if axis in self.sizes.depth else 1
            sizes[axis] = evaluate(size, config, sizes, self.key, least)
        return sizes | {axis: sizes[of] for axis, of in self.sizes.follows.items()}

    @property
    def positions_key(self) -> str:
        """The config key that bounds the length of a row."""
        return self.key("pos") if "pos" in self.sizes.axes else "max_position_embeddings"

    def positions(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that a row may have under a config: its positions, less those kept for padding; None where the config
        bounds none."""
        rows = config.get(self.positions_key)
        return None if rows is None else int(rows) - self.sizes.first_position

    def resize(self, config: Mapping[str, Any], changes: Mapping[str, int]) -> dict[str, Any]:
        """The config with other sizes of some axes. With ``embed`` the units scale too, unless given: same head size.

        Raises InvalidConfig for an unknown axis and for sizes that the config cannot say.
        """
        old = self.axis_sizes(config)
        for axis in changes:
            if axis not in self.sizes.axes:
                raise InvalidConfig(
                    f"{axis} is not an axis of a {self.model_type}; {did_you_mean(axis, self.sizes.axes)}"
                )
        new = old | dict(changes)
        for unit in self.sizes.units:
            scale = new["embed"] / old["embed"]
            if unit not in changes and unit != "group" and "embed" in changes:
                new[unit] = round(old[unit] * scale)
                if new[unit] != old[unit] * scale:
                    raise InvalidConfig(
                        f"embed {old['embed']} -> {new['embed']} does not scale {unit}={old[unit]} to a whole number; "
                        f"give {unit} too"
                    )
        resized, keys = dict(config), {products(size)[0][0].name for size in self.sizes.axes.values()}
        for axis, size in self.sizes.axes.items():
            usual, *others = products(size)
            first, *rest = (term.name for term in usual)
            synonyms = [one.name for one, *more in others if not more and one.name in config and one.name not in keys]
            first = synonyms[0] if synonyms and first not in config else first
            if first in self.sizes.axes or axis == "labels" or (axis in ("qk", "v") and rest and axis not in changes):
                continue
            resized[first] = new[axis] * (new[rest[0]] if rest else 1)
        made = self.axis_sizes(resized)
        for axis, wanted in new.items():
            if axis in (*changes, *self.sizes.units) and made.get(axis) != wanted:
                raise InvalidConfig(
                    f"a {self.model_type} cannot have {axis}={wanted} with "
                    + ", ".join(f"{a}={made[a]}" for a in changes if a != axis)
                    + f": it would be {made.get(axis)}"
                )
        return resized

    def in_class(self, name: str, cls: str) -> str:
        """A tensor's name in a transformers class: base models lack the prefix, some classes have another."""
        base = cls.endswith("Model") and not cls.endswith("LMHeadModel")
        prefix = "" if base else self.names.prefixes.get(cls, self.names.prefix)
        return prefix + name.removeprefix(self.names.prefix) if self._inner(name) else name

    def _inner(self, name: str) -> bool:
        """Whether a canonical tensor, or tied copy, is of the base model, and of no head."""
        if self.names.prefix:
            return name.startswith(self.names.prefix)
        inner = {row.name.split(".")[0] for row in self.rows if row.depth} | {self.names.anchor.split(".")[0]}
        return name.split(".")[0] in inner

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the decoder is the word embedding."""
        return bool(config.get("tie_word_embeddings", self.names.tie_default))

    def retied(self, config: Mapping[str, Any], tied: bool) -> Mapping[str, Any]:
        """The config of a model whose files show whether it is tied, where that is not the config's to say; else, and
        where it says so already, the config itself."""
        key = self.names.untie
        if not key or self.tied(config) == tied:
            return config
        return {**config, key: config.get(key, self.tied(config)), "tie_word_embeddings": tied}

    def std(self, pattern: str, config: Mapping[str, Any]) -> float:
        """The standard deviation with which transformers draws a fresh weight of this row."""
        sizes, base = self.axis_sizes(config), config.get("initializer_range", 0.02)
        if not isinstance(base, (int, float)):
            raise InvalidConfig(f"model config: initializer_range is {base!r}; a number is expected")
        own = next((std for end, std in self.stds.items() if pattern.endswith(end)), None)
        return base if own is None else deviation(own, sizes, base, config.get("initializer_factor", 1.0))

    def settled(self, config: Mapping[str, Any], heads: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What a growth from or to this config, with these heads, cannot change: key -> its value, or its default."""
        defaults, agree_when = self.compatible.must_agree, self.compatible.agree_when
        full = {"heads": " ".join(sorted(heads)), **defaults, "tie_word_embeddings": self.names.tie_default, **config}
        if "rope_parameters" in defaults:
            full["rope_parameters"] = rotary(config, defaults["rope_parameters"])
        full |= {key: full[of] for key, value in defaults.items() if key not in config and (of := referred(value))}
        return {
            key: full[key]
            for key in defaults
            if key not in agree_when or any(holds(when, full) for when in agree_when[key])
        }

    def layer_kind(self, config: Mapping[str, Any], layer: int) -> str:
        """The kind of a layer under a config; layers of one kind are interchangeable. Raises InvalidConfig."""
        key, (period, usual) = self.compatible.kinds, self.compatible.every
        kinds = config.get(key) if key else None
        if kinds is None:
            every = config.get(period, usual)
            if period and not (isinstance(every, int) and every > 0):
                raise InvalidConfig(f"model config: {period} is {every!r}; a positive integer is expected")
            return "" if not every else "sliding_attention" if layer % every else "full_attention"
        if not isinstance(kinds, list) or layer >= len(kinds):
            raise InvalidConfig(f"model config: {key} is {kinds!r}; a list with the kind of each layer is expected")
        return str(kinds[layer])

    def later(self, depth: str) -> tuple[str, ...]:
        """The names of the rows that the first layer of a stack lacks and those above it have."""
        first = {row.name for row in self.rows if row.has(0)}
        return tuple(dict.fromkeys(r.name for r in self.rows if r.depth == depth and r.name not in first))

    def layer_parts(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The part of every layer, in order, through all stacks: "layer.0", ..."""
        sizes = self.axis_sizes(config)
        return tuple(f"{depth.removesuffix('s')}.{i}" for depth in self.sizes.depth for i in range(sizes[depth]))

    def parameters(self, config: Mapping[str, Any], heads: frozenset[str]) -> dict[str, Parameter]:
        """Every parameter by its full name, in the order of the table; tied copies are left out.

        Outside the layers, rows before them are of the embeddings, rows after them of the head; a word embedding that
        is the head's decoder, too, is of the head.
        """
        sizes, tied = self.axis_sizes(config), self.tied(config) and _LM in heads
        rows = [
            row
            for row in self.rows
            if present(row.needs, heads) and row.tied in (None, tied) and holds(row.when, config)
        ]
        decoders = {tie.kept for tie in self._ties(config, heads) if asks(tie.needs, _LM)}
        found: dict[str, Parameter] = {}
        part = "embeddings"
        for depth, span in groupby(rows, key=lambda row: row.depth):
            block = list(span)
            for layer in range(sizes[depth]) if depth else (None,):
                for row in block:
                    if layer is None:
                        own = "unused" if row.untrained and _LM in heads else "head" if row.name in decoders else part
                    else:
                        own = f"{depth.removesuffix('s')}.{layer}"
                    if layer is None or row.has(layer):
                        found.update((p.name, p) for p in _expand(row, layer, sizes, own))
            part = "head" if depth else part
        return found

    def aliases(self, config: Mapping[str, Any], heads: frozenset[str]) -> dict[str, str]:
        """Absent tied name -> kept name, for the heads present."""
        return {tie.absent: tie.kept for tie in self._ties(config, heads)}

    def _ties(self, config: Mapping[str, Any], heads: frozenset[str]) -> list[Tie]:
        tied = self.tied(config)
        return [tie for tie in self.names.ties if present(tie.needs, heads) and tie.tied in (None, tied)]


def _written(spec: str) -> str:
    """The dims that a spec writes: a bias's."""
    return (spec.split("->")[1] if "->" in spec else spec.split("<-")[0]).strip()


def _expand(row: Row, layer: int | None, sizes: Mapping[str, int], part: str) -> Iterator[Parameter]:
    for kind, pattern in weight_and_bias(row.name).items():
        spec = _written(row.spec) if kind == "bias" else row.spec
        shape = axes.shape(spec, sizes)
        p = Parameter("", spec, shape, layer, pattern, row.depth, part, row.decay and len(shape) > 1)
        yield replace(p, name=p.at(layer))
