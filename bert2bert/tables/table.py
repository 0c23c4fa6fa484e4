"""What a table of an architecture holds, and what follows from one and a config: names, specs, shapes, ties.

A row's name may hold ``{weight,bias}`` (two tensors: the bias has the written dims of the spec alone) and one depth
axis in braces, ``{layers}``, which numbers the layers. Axis sizes are small expressions over config keys, see `sizes`.
Refuses configs that lack a size, or whose sizes do not divide where they must (`InvalidConfig`), and settings that the
rows do not describe (`UnsupportedGrowth`). Longer than other modules: `Table` is one value, and its methods read one
another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from bert2bert.algebra import axes
from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.tables.expressions import evaluate, holds, present
from bert2bert.tables.rope import rotary

_BOTH = "{weight,bias}"
_LM = "lm"  # the language-model head
_DEPTH = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Row:
    """One line of a table: name pattern, spec, and when the tensor exists.

    needs: heads that the model must have, or with '!' not have ('decoder !lm'), or one of which it must have
    ('lm|qa'). tied: only with (True) or without (False) a language-model head that is the word embedding. when: a
    condition on the config, 'key', '!key' or 'key=glob'. only: the range [first, end) of the layers that have it, None
    = all above. untrained: whether pre-training with a language-model head leaves it alone. decay: whether weight decay
    applies to a tensor of more than one dimension (to others it never does).
    """

    name: str
    spec: str
    needs: str = ""
    tied: bool | None = None
    when: str = ""
    only: tuple[int, int | None] = (0, None)
    untrained: bool = False
    decay: bool = True

    @property
    def depth(self) -> str:
        """The depth axis that numbers this row's layers, '' outside the layers."""
        found = _DEPTH.findall(self.name)
        return found[0] if found else ""

    def has(self, layer: int) -> bool:
        """Whether this layer has the tensor."""
        first, end = self.only
        return layer >= first and (end is None or layer < end)


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model. layer: None outside the layers; depth: the axis that numbers the layer, '' outside;
    pattern: its row's name, with weight or bias filled in. part: of the network, with which it learns: 'embeddings',
    'head', 'unused', or 'layer.3' (of a second stack 'decoder_layer.3'); decay: whether weight decay applies, as
    transformers' Trainer has it."""

    name: str
    spec: str
    shape: tuple[int, ...]
    layer: int | None
    pattern: str
    depth: str
    part: str
    decay: bool

    def at(self, layer: int | None) -> str:
        """The name of the same tensor in another layer."""
        return self.pattern if layer is None else self.pattern.replace("{" + self.depth + "}", str(layer))


@dataclass(frozen=True)
class Tie:
    """A tensor that is another one. needs, tied: as in `Row`."""

    absent: str
    kept: str
    needs: str = ""
    tied: bool | None = True


@dataclass(frozen=True)
class Table:
    """One architecture.

    outer: the name prefix of the base model inside the full one ('' if none); outers: of the transformers classes that
    have another one; anchor: a tensor that every variant has, less outer. classes: transformers class -> heads, the
    usual one first.
    sizes: axis -> an expression over config keys, axes named before it and whole numbers: ``a/b`` (must divide),
    ``a*b``, alternatives ``a|b`` (the first that the config has). constants: axes of a fixed size.
    follows: axis -> the axis whose size and map it has (the coordinates after a norm follow the residual stream's).
    depth: the axes that number layers.
    norm: 'layer' or 'rms'; prenorm: whether norms stand inside the residual branches; eps: the config key of the norms'
    epsilon and transformers' default; normalised: axes that a norm renormalises; ``rho`` in a spec marks a norm's gain,
    ``iota`` what norms inside attention read (as the others' epsilon changes with the width, so must that).
    scales: axis of size one -> the axis by whose size the model divides there under a square root, so that its gain is
    √(target / source).
    units: axes whose features are whole units (heads, neurons) with maps that may differ by layer, except those in
    ``aligned``, which one tensor outside the layers ties together.
    fixed: axis -> why its size cannot change. must_agree: config keys that a growth cannot change -> their defaults,
    '=KEY' for another key's value; agree_when: those of them that matter only when one of these conditions on the
    config holds (as in `Row`; 'heads' is a key, too: the model's, sorted).
    requires: config key -> the only value that the rows describe (also its default). multiples: model type -> a config
    key and the one whose multiple transformers wants it to be.
    ties: tensors that are others; tie_default: transformers' default of tie_word_embeddings.
    stds: the end of a row's name -> the standard deviation of a fresh weight: axes and whole numbers to multiply under
    1/√, after 'range' if times the config's initializer_range; others take initializer_range, see `std`.
    first_position: positions from which on rows are for tokens (RoBERTa keeps two for padding).
    kinds: the config key that lists each layer's kind (attention pattern), '' where layers are alike; every: the key,
    and its default, of the period with which full attention comes where that list is absent, 0 = all layers are alike.
    dense: for experts, pattern -> the patterns of the dense model's tensors that make one expert, in storage order;
    dense_types: the dense model types that can be upcycled.
    ignores: transformers class, '' for all -> patterns of stored tensors that it does not have and leaves unread.
    """

    model_type: str
    outer: str
    anchor: str
    classes: Mapping[str, frozenset[str]]
    sizes: Mapping[str, str]
    rows: tuple[Row, ...]
    norm: str
    prenorm: bool
    eps: tuple[str, float]
    units: tuple[str, ...]
    outers: Mapping[str, str] = field(default_factory=dict)
    normalised: frozenset[str] = frozenset({"embed"})
    constants: Mapping[str, int] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    depth: tuple[str, ...] = ("layers",)
    scales: Mapping[str, str] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    fixed: Mapping[str, str] = field(default_factory=dict)
    must_agree: Mapping[str, Any] = field(default_factory=dict)
    agree_when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    multiples: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    tie_default: bool = True
    stds: Mapping[str, str] = field(default_factory=dict)
    first_position: int = 0
    kinds: str = ""
    every: tuple[str, int] = ("", 0)
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense_types: tuple[str, ...] = ()
    ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def key(self, axis: str) -> str:
        """The config key to change for another size of an axis."""
        axis = self.follows.get(axis, axis)
        found: str = re.split(r"[/*|]", self.sizes[axis])[0]
        return self.key(found) if found in self.sizes and found != axis else found

    def axis_sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The size of every axis under a config. Raises InvalidConfig, UnsupportedGrowth."""
        for key, value in self.requires.items():
            if (found := config.get(key, value)) != value:
                raise UnsupportedGrowth(
                    f"model config: {key} is {found!r}; a {self.model_type} is described only with {key}={value!r}"
                )
        key, divisor = self.multiples.get(self.model_type, ("", ""))
        whole, part = config.get(key), config.get(divisor)
        if isinstance(whole, int) and isinstance(part, int) and part > 0 and whole % part:
            raise InvalidConfig(
                f"model config: {key}={whole} is no multiple of {divisor}={part}, without which transformers makes "
                f"no {self.model_type}; choose sizes that divide"
            )
        sizes = dict(self.constants)
        for axis, expression in self.sizes.items():
            sizes[axis] = evaluate(expression, config, sizes, self.key)
        return sizes | {axis: sizes[of] for axis, of in self.follows.items()}

    def resize(self, config: Mapping[str, Any], changes: Mapping[str, int]) -> dict[str, Any]:
        """The config with other sizes of some axes. With ``embed`` the units scale too, unless given: same head size.

        Raises InvalidConfig for an unknown axis and for sizes that the config cannot say.
        """
        old = self.axis_sizes(config)
        for axis in changes:
            if axis not in self.sizes:
                raise InvalidConfig(f"{axis} is no axis of a {self.model_type}; {did_you_mean(axis, self.sizes)}")
        new = old | dict(changes)
        for unit in self.units:
            scale = new["embed"] / old["embed"]
            if unit not in changes and unit != "group" and "embed" in changes:
                new[unit] = round(old[unit] * scale)
                if new[unit] != old[unit] * scale:
                    raise InvalidConfig(
                        f"embed {old['embed']} -> {new['embed']} does not scale {unit}={old[unit]} to a whole number; "
                        f"give {unit} too"
                    )
        resized, keys = dict(config), {re.split(r"[/*|]", expression)[0] for expression in self.sizes.values()}
        for axis, expression in self.sizes.items():
            first, *rest = re.findall(r"[\w.]+", expression.split("|")[0])
            synonyms = [key for key in expression.split("|")[1:] if key in config and key not in keys]
            first = synonyms[0] if synonyms and first not in config else first
            if first in self.sizes or axis == "labels" or (axis in ("qk", "v") and rest and axis not in changes):
                continue
            resized[first] = new[axis] * (new[rest[0]] if rest else 1)
        made = self.axis_sizes(resized)
        for axis, size in new.items():
            if axis in (*changes, *self.units) and made.get(axis) != size:
                raise InvalidConfig(
                    f"a {self.model_type} cannot have {axis}={size} with "
                    + ", ".join(f"{a}={made[a]}" for a in changes if a != axis)
                    + f": it would be {made.get(axis)}"
                )
        return resized

    def in_class(self, name: str, cls: str) -> str:
        """A tensor's name in a transformers class: base models lack the outer name, some classes have another."""
        base = cls.endswith("Model") and not cls.endswith("LMHeadModel")
        outer = "" if base else self.outers.get(cls, self.outer)
        return outer + name.removeprefix(self.outer) if self._inner(name) else name

    def _inner(self, name: str) -> bool:
        """Whether a canonical tensor, or tied copy, is of the base model, and of no head."""
        if self.outer:
            return name.startswith(self.outer)
        inner = {row.name.split(".")[0] for row in self.rows if row.depth} | {self.anchor.split(".")[0]}
        return name.split(".")[0] in inner

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the decoder is the word embedding."""
        return bool(config.get("tie_word_embeddings", self.tie_default))

    def std(self, pattern: str, config: Mapping[str, Any]) -> float:
        """The standard deviation with which transformers draws a fresh weight of this row."""
        sizes, base = self.axis_sizes(config), config.get("initializer_range", 0.02)
        if not isinstance(base, (int, float)):
            raise InvalidConfig(f"model config: initializer_range is {base!r}; a number is expected")
        for end, product in self.stds.items():
            if pattern.endswith(end):
                terms = product.split()
                factors = [int(t) if t.isdigit() else sizes[t] for t in terms if t != "range"]
                scale = base if "range" in terms else float(config.get("initializer_factor", 1.0))
                return scale / math.sqrt(math.prod(factors))
        return base

    def settled(self, config: Mapping[str, Any], heads: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What a growth from or to this config, with these heads, cannot change: key -> its value, or its default."""
        full = {"heads": " ".join(sorted(heads)), **self.must_agree, "tie_word_embeddings": self.tie_default, **config}
        if "rope_parameters" in self.must_agree:
            full["rope_parameters"] = rotary(config, self.must_agree["rope_parameters"])
        full |= {k: full[v[1:]] for k, v in full.items() if k in self.must_agree and str(v).startswith("=")}
        return {
            key: full[key]
            for key in self.must_agree
            if key not in self.agree_when or any(holds(when, full) for when in self.agree_when[key])
        }

    def layer_kind(self, config: Mapping[str, Any], layer: int) -> str:
        """The kind of a layer under a config; layers of one kind are interchangeable. Raises InvalidConfig."""
        kinds = config.get(self.kinds) if self.kinds else None
        if kinds is None:
            every = config.get(*self.every)
            if self.every[0] and not (isinstance(every, int) and every > 0):
                raise InvalidConfig(f"model config: {self.every[0]} is {every!r}; a positive integer is expected")
            return "" if not every else "sliding_attention" if layer % every else "full_attention"
        if not isinstance(kinds, list) or layer >= len(kinds):
            raise InvalidConfig(
                f"model config: {self.kinds} is {kinds!r}; a list with the kind of each layer is expected"
            )
        return str(kinds[layer])

    def later(self, depth: str) -> tuple[str, ...]:
        """The names of the rows that the first layer of a stack lacks and those above it have."""
        first = {row.name for row in self.rows if row.has(0)}
        return tuple(dict.fromkeys(r.name for r in self.rows if r.depth == depth and r.name not in first))

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
        decoders = {tie.kept for tie in self._ties(config, heads) if _LM in tie.needs.split()}
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
        return [tie for tie in self.ties if present(tie.needs, heads) and tie.tied in (None, tied)]


def _written(spec: str) -> str:
    """The dims that a spec writes: a bias's."""
    return (spec.split("->")[1] if "->" in spec else spec.split("<-")[0]).strip()


def _expand(row: Row, layer: int | None, sizes: Mapping[str, int], part: str) -> Iterator[Parameter]:
    kinds = (("weight", row.spec), ("bias", _written(row.spec))) if _BOTH in row.name else (("", row.spec),)
    for kind, spec in kinds:
        shape = axes.shape(spec, sizes)
        pattern = row.name.replace(_BOTH, kind)
        p = Parameter("", spec, shape, layer, pattern, row.depth, part, row.decay and len(shape) > 1)
        yield replace(p, name=p.at(layer))
