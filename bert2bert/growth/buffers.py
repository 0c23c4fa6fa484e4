"""What a model's state dict holds beside its parameters, and what of it the grown model has.

DeepSpeed loads a native checkpoint strictly, so a script whose model has such entries must find them, for every layer
and in its own sizes. Entries that no size of the growth touches are carried, a layer's with the layer that it is grown
of; positions, causal masks and rotary frequencies, which older versions of transformers stored, are computed for the
grown config, if that formula gives what the source holds.

Refuses, as UnsupportedGrowth, an entry whose value in the grown model is not known, by its name; so are entries outside
the layers of which there is one for each layer, such as averages of a model's weights, where the layers change.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bert2bert.checkpoints.hub.names import is_obsolete
from bert2bert.checkpoints.zero.model_states import EXTRA
from bert2bert.errors import UnsupportedGrowth, some
from bert2bert.files.torch_writer import equal
from bert2bert.files.unpickle import walk

if TYPE_CHECKING:
    from torch import Tensor

    from bert2bert.checkpoints.source import Source
    from bert2bert.growth.opened import Growth


class _Place(NamedTuple):
    """A name inside the layers: what comes before the layer's number, the number, what follows."""

    before: str
    layer: int
    after: str


@dataclass(frozen=True)
class Carried:
    """What a grown model's state dict holds beside parameters, by the names of the files."""

    buffers: dict[str, Any]
    extras: dict[str, Any]


def grown(growth: Growth, format: str) -> Carried:
    """The buffers and extra states of the grown model, in a target of this format."""
    source = growth.model.source
    if "hub" in (source.format, format):  # transformers' current models have none
        return Carried({}, {})
    layers = _Layers(growth)
    return Carried(layers.grown(source.buffers), layers.grown(source.extras))


def left_out(source: Source, format: str) -> list[str]:
    """A sentence about what a run's state dict holds and a Hugging Face folder of its growth does not."""
    names = [*source.buffers, *source.extras] if format == "hub" != source.format else []
    return [f"left out, for models of transformers store no buffers: {some(names)}"] if names else []


def unchanged(source: Source, buffers: Mapping[str, Any]) -> list[str]:
    """A sentence about the source's buffers in no layer that a grown checkpoint has as they are."""
    names = [
        name for name, value in source.buffers.items()
        if buffers.get(name) is value and not is_obsolete(name) and not any(map(str.isdigit, name.split(".")))
    ]  # fmt: skip
    return [
        f"carried as they are: {len(names)} buffers in no layer, first {names[0]}; those that a script makes of the "
        "model's parameters, such as averages of them, it must make again"
    ] if names else []  # fmt: skip


class _Layers:
    """Knows which layers of the source a layer of the target is made of, and which sizes change."""

    def __init__(self, growth: Growth) -> None:
        self.model, self.plan = growth.model, growth.plan
        table, parameters = self.model.table, self.model.parameters.values()
        self._starts = sorted({p.pattern.split("{" + p.depth + "}")[0] for p in parameters if p.depth}, key=len)
        self._from: dict[tuple[str, int], set[int]] = {}
        for name in self.plan.tensors:
            if (at := self._place(name)) is not None:
                roots = [self._place(root) for root in growth.roots(name)]
                self._from.setdefault(at[:2], set()).update(r.layer for r in roots if r and r.before == at.before)
        self._layers: dict[str, set[int]] = {}
        for name in self.model.parameters:
            if (at := self._place(name)) is not None:
                self._layers.setdefault(at.before, set()).add(at.layer)
        old, new = (table.axis_sizes(config) for config in (self.model.config, self.plan.config))
        self._depths = {old[axis]: new[axis] for axis in table.sizes.depth if old[axis] != new[axis]}
        self._changed, self._tables = self._growing()

    def _growing(self) -> tuple[set[int], set[int]]:
        """Sizes that grow, and the numbers of layers that grow and are no other size of the grown model."""
        table, config, target = self.model.table, self.model.config, self.plan.config
        of = {table.key(axis) for axis in table.sizes.depth}
        sizes = {key: value for key, value in config.items() if isinstance(value, int) and key not in of}
        changed = {value for key, value in sizes.items() if target.get(key) not in (None, value)}
        same = {*sizes.values()}
        for name, tensor in self.plan.tensors.items():
            was = self.model.parameters[name].shape if name in self.model.parameters else tensor.shape
            changed |= {one for one, other in zip(was, tensor.shape, strict=False) if one != other}
            same |= {*tensor.shape}
        return changed - {0, 1}, {*self._depths} - {0, 1} - same

    def grown(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Of each entry what the grown model has in its place, by the files' names."""

        outside = _one_a_layer((n for n in held if not self._place(self.model.naming.canonical(n))), self._depths)
        found: dict[str, Any] = {}
        layered: dict[tuple[str, str], dict[int, str]] = {}
        for name in held:
            if (at := self._place(self.model.naming.canonical(name))) is None:
                if (depth := outside.get(name)) is not None:
                    why = f"there is one for each of {depth} layers, and the grown model has {self._depths[depth]}"
                    raise self._refusal(name, why)
                found[name] = self._value(name, held[name])
                rows = 0 if name.endswith(EXTRA) else next(iter(getattr(found[name], "shape", ())), 0)
                if rows in self._tables:
                    raise self._refusal(name, f"it has {rows} rows, as many as there are layers, which grow")
            else:
                layered.setdefault((at.before, at.after), {})[at.layer] = name
        for (before, after), names in layered.items():
            first = next(iter(names.values()))
            alike = all(equal(held[name], held[first]) for name in names.values())
            for start, layer in self._from:
                if start != before:
                    continue
                origins = self._from[start, layer]
                having = origins & names.keys() if origins else names.keys()
                sure = alike and having == (origins or self._layers[start])
                if len(origins) != 1 and having and not sure:
                    raise self._refusal(first, f"layer {layer} is not made of one layer")
                origin = names[min(having)] if having else None
                if origin is not None:  # not every layer has it
                    stored = self.model.stored(f"{before}{layer}{after}")
                    found[stored] = self._value(origin, held[origin])
        return found

    def _place(self, name: str) -> _Place | None:
        for start in self._starts:
            if found := re.match(rf"({re.escape(start)})(\d+)(\..*)", name):
                return _Place(found[1], int(found[2]), found[3])
        return None

    def _value(self, name: str, value: Any) -> Any:

        if isinstance(value, torch.Tensor) and not value.is_complex():
            for pattern, formula in _FORMULAS.items():
                if fnmatchcase(name, pattern) and (made := self._computed(formula, value)) is not None:
                    return made
        if sizes := sorted(_sizes(value) & self._changed):
            raise self._refusal(name, f"its size {sizes[0]} is one that grows")
        return value

    def _computed(self, formula: Callable[[Mapping[str, Any]], Iterable[Tensor]], value: Tensor) -> Tensor | None:

        for mine, grown in zip(formula(self.model.config), formula(self.plan.config), strict=False):
            near = 4 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
            if mine.shape == value.shape and torch.allclose(mine.double(), value.double(), near, 0.0):
                return grown.to(value.dtype)
        return None

    def _refusal(self, name: str, why: str) -> UnsupportedGrowth:
        return UnsupportedGrowth(
            f"{self.model.source.path}: the model's state dict holds '{name}', which is not a parameter, and its value "
            f"in the grown model is not known: {why}.\nTake the weights alone (--format hub), or save the checkpoint "
            "without it (register_buffer(..., persistent=False))."
        )


def _one_a_layer(names: Iterable[str], depths: Collection[int]) -> dict[str, int]:
    """Of names outside the layers those that differ from each other in one number alone, from 0 up to a number of
    layers (of ``depths``), as the averages of a model's weights do -> that number."""
    alike: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        for number in re.finditer(r"\d+", name):
            alike[name[: number.start()], name[number.end() :]][int(number[0])] = name
    return {
        name: len(numbers)
        for numbers in alike.values()
        if len(numbers) in depths and len(numbers) > 1 and max(numbers) == len(numbers) - 1
        for name in numbers.values()
    }


def _sizes(value: Any) -> set[int]:
    """Of the dimensions of every tensor in a value."""

    return {size for part in walk(value) if isinstance(part, torch.Tensor) for size in part.shape}


def _length(config: Mapping[str, Any]) -> int:
    return int(next((config[k] for k in ("max_position_embeddings", "n_positions", "n_ctx") if config.get(k)), 0))


def _arange(config: Mapping[str, Any]) -> Iterable[Tensor]:

    yield torch.arange(_length(config))[None]


def _zeros(config: Mapping[str, Any]) -> Iterable[Tensor]:

    yield torch.zeros(1, _length(config))


def _causal(config: Mapping[str, Any]) -> Iterable[Tensor]:

    yield torch.ones(1, 1, _length(config), _length(config)).tril()


def _frequencies(config: Mapping[str, Any]) -> Iterable[Tensor]:
    """Of rotary positions, for every base that the config may mean."""

    if not (config.get("head_dim") or config.get("hidden_size")):
        return  # of a family without rotary positions
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] if isinstance(rope, Mapping) else []
    bases = [config.get("rope_theta"), *(kind.get("rope_theta") for kind in (rope, *kinds)), 10000.0]
    for base in bases:
        if base:
            yield 1.0 / (float(base) ** (torch.arange(0, size, 2).float() / size))


_FORMULAS: dict[str, Callable[[Mapping[str, Any]], Iterable[Tensor]]] = {
    "*position_ids": _arange,
    "*token_type_ids": _zeros,
    "*attn.bias": _causal,
    "*attention.bias": _causal,
    "*inv_freq": _frequencies,
}
"""Of buffers that older versions of transformers stored: how they follow from a config."""
