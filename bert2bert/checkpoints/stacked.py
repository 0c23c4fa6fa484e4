"""A source whose experts are stored one by one, seen with those of a layer fused, as in the models of transformers 5.

Hugging Face folders are always seen so, except what `reshard` wrote of a model whose experts are modules of their own
(transformers 4), which its manifest lists. The runs of such models are seen so where they grow, and their growths are
written in the run's own names (`Stacked.apart`): a script of transformers 4 goes on with weights and moments of every
expert.

Refuses, as InvalidCheckpoint, experts that are not all there or not of one shape; as UnsupportedGrowth, where groups
matter, experts of a layer that are trained apart or named each in its own way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from bert2bert.checkpoints.hub import experts
from bert2bert.checkpoints.source import Source, TensorMeta
from bert2bert.errors import UnsupportedGrowth


class Part(NamedTuple):
    """Where a tensor's values lie: in the tensor ``name``, from its flat element ``start`` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0


def as_in_models(source: Source, keep: Collection[str] = ()) -> Source:
    """A Hugging Face folder by the names of transformers 5: experts fused, a block's old name replaced. keep: stored
    names that stay as they are."""
    found = Stacked(source, keep)
    return source if found.tensors.keys() == source.tensors.keys() else found


def with_fused_experts(source: Source) -> Source:
    """The source, with its experts fused if any are stored one by one."""
    return Stacked(source) if experts.fused(source.tensors) else source


class Stacked(Source):
    """See the module. ``single``: the source as it is stored; ``experts``: fused tensor -> its parts."""

    def __init__(self, single: Source, keep: Collection[str] = ()) -> None:
        vars(self).update(vars(single))  # a view: what is not set here is the source's
        self.format, self.single = single.format, single
        self.experts = experts.fused(name for name in single.tensors if name not in keep)
        self._parts = {name: [part for expert in each for part in expert] for name, each in self.experts.items()}
        seen = {part: name for name, parts in self._parts.items() for part in parts}
        for name in single.tensors.keys() - seen.keys():
            seen[name] = name if name in keep else experts.model_name(name)
        self._stored = {seen[name]: name for name in single.tensors if seen[name] not in self.experts}
        self.tensors = {new: replace(single.tensors[old], name=new) for new, old in self._stored.items()}
        self.tensors |= {name: self._fused(name) for name in self.experts}
        self.groups = [
            {**group, "names": list(dict.fromkeys(seen[name] for name in group["names"]))} for group in single.groups
        ]
        self._steps = {name: max(map(single.step, self.parts(name))) for name in self.tensors}

    def _fused(self, name: str) -> TensorMeta:
        metas = [self.single.tensors[part] for part in self._parts[name]]
        shape = experts.shape(name, self.experts[name], {meta.name: meta.shape for meta in metas})
        dtypes = {meta.dtype for meta in metas}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float64" if "float64" in dtypes else "float32"
        return TensorMeta(name, shape, dtype, metas[0].group, any(meta.trainable for meta in metas))

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        if meta.name not in self.experts:
            return self.single.read(self._stored[meta.name], state, start, stop)
        each = [torch.cat([self._whole(part, state) for part in e]) for e in self.experts[meta.name][start:stop]]
        found = torch.stack(each) if each else torch.empty(0, *meta.shape[1:])  # rows are experts
        return found.to(getattr(torch, meta.dtype)) if state == "fp32" else found  # that holds those of all parts

    def _whole(self, part: str, state: str) -> torch.Tensor:
        return self.single.read(part, state, 0, self.single.tensors[part].shape[0])

    def parts(self, name: str) -> list[str]:
        """The stored tensors of a tensor, by the names of ``single``."""
        return self._parts.get(name) or [self._stored[name]]

    def renamed(self) -> Iterable[tuple[str, str]]:
        """Seen and stored name of all tensors but experts."""
        return self._stored.items()

    def check_alike(self) -> None:
        """Refuse (UnsupportedGrowth) experts of a layer that are not all in one optimizer group, or not all frozen, or
        whose names follow no one pattern: a growth has them as one tensor."""
        for name, (first, *others) in self._parts.items():
            one = self.single.tensors[first]
            for two in (self.single.tensors[other] for other in others):
                if (one.group, one.trainable) != (two.group, two.trainable):
                    raise UnsupportedGrowth(
                        f"{self.path}: the experts of {name} are trained apart: {first} is {_how(one)}, {two.name} is "
                        f"{_how(two)}. They grow as one tensor, which is in one optimizer group.\n"
                        "Take the weights alone with --format hub."
                    )
        own = self.apart({name: meta.shape for name, meta in self.tensors.items()})
        if odd := [name for name in self.single.tensors if name not in own]:
            raise UnsupportedGrowth(
                f"{self.path}: {odd[0]} is not named as the other experts, so the names of more are not known.\n"
                "Take the weights alone with --format hub."
            )

    def apart(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
        """Tensors of any sizes, seen as this source's are, by the names under which it would store them. A block's
        router and experts are in the order that they have here, all else in that of ``shapes``."""
        style = _Style(self)
        found = {own: part for name, size in shapes.items() for own, part in style.parts(name, size).items()}
        ordered: list[str] = []
        for block, group in groupby(found, lambda own: experts.block(found[own].name)):
            names = list(group)
            ordered += names if block is None else sorted(names, key=style.place.__getitem__)
        return {own: found[own] for own in ordered}


class _Style:
    """How a source stores blocks of experts. ``place``: sorts the names that `parts` gave, of one block."""

    def __init__(self, source: Stacked) -> None:
        index = {name: i for i, name in enumerate(source.single.tensors)}
        self._maps = {name: [experts.template(part) for part in each[0]] for name, each in source.experts.items()}
        self._first: dict[str, str] = {}  # kind -> the first fused tensor of it
        for name in source.experts:
            self._first.setdefault(str(experts.kind(name)), name)
        self._order = {
            kind: [index[part] for part in source.experts[name][0]] for kind, name in self._first.items()
        }  # of the maps of an expert
        first = next(iter(self._first.values()))
        routers = (old for new, old in source.renamed() if experts.block(new) == experts.block(first))
        before = all(index[router] < min(self._order[str(experts.kind(first))]) for router in routers)
        self._router = -1 if before else 1
        self._block = self._maps[first][0].partition(".")[0]
        self.place: dict[str, tuple[int, int, int]] = {}

    def parts(self, name: str, size: tuple[int, ...]) -> dict[str, Part]:
        kind, before = experts.kind(name), experts.block(name)
        if before is None:
            return {name: Part(name, size)}
        if kind is None:
            own = f"{before}{self._block}{name.removeprefix(f'{before}mlp')}"
            self.place[own] = self._router, 0, 0
            return {own: Part(name, size)}
        maps = self._maps.get(name) or self._maps[self._first[kind]]
        split = experts.split(size, [before + each for each in maps])
        for i, own in enumerate(split):
            self.place[own] = 0, i // len(maps), self._order[kind][i % len(maps)]
        return {own: Part(name, *where) for own, where in split.items()}


def _how(meta: TensorMeta) -> str:
    return f"in optimizer group {meta.group}" if meta.trainable else "frozen"
