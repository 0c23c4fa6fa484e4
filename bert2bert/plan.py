"""A growth as data: for every target tensor, which entries of which source tensors it is made of, with what factor.

A `TensorPlan` is a set of `Term`s that fill disjoint parts of the target, over a `Fill` where no term speaks. Each dim
of a term is an index into the source dim and two coefficient chains, one for parameters and one for gradients; a chain
holds one vector per growth, so that two growths fused into one plan multiply in the same order as the two run in
sequence and agree with them bit for bit. A plan narrowed to some rows needs only the source rows that those name.

Imports no torch: a plan of a model of any size is a few index lists.
Refuses: to fuse a growth whose first step fills or adds noise (`UnsupportedGrowth`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.errors import UnsupportedGrowth
from bert2bert.maps import Coefficients, Gather, Index

Chain = tuple[Coefficients, ...]


@dataclass(frozen=True, eq=False)
class Dim:
    """One dim of a term. index: [target] source position, -1 is silent; param, grad: coefficients over [target]."""

    index: Index
    param: Chain = ()
    grad: Chain = ()

    @classmethod
    def of(cls, gather: Gather) -> Dim:
        """The dim of a tensor that writes the axis (pass ``~gather`` for one that reads it)."""
        return cls(
            gather.index,
            () if gather.gain is None else (gather.gain,),
            () if gather.share is None else (gather.share,),
        )

    def __getitem__(self, rows: slice | Index) -> Dim:
        return Dim(self.index[rows], tuple(c[rows] for c in self.param), tuple(c[rows] for c in self.grad))

    def after(self, first: Dim) -> Dim:
        """This growth of a dim applied to the result of the first."""
        taken = first[self.index]
        return Dim(np.where(self.index >= 0, taken.index, -1), taken.param + self.param, taken.grad + self.grad)

    @property
    def full(self) -> bool:
        """Whether no target position is silent."""
        return bool((self.index >= 0).all())


@dataclass(frozen=True, eq=False)
class Term:
    """The entries that come from one source tensor: the outer product of the dims' positions that are not silent."""

    source: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Fill:
    """What stands where no term speaks: ``kind`` 'normal' (mean 0, std), 'ones' or 'zeros'; moments are 0 there."""

    kind: str
    std: float = 0.0


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise N (I - E L) on the last dim, which reads: it changes no output, whatever N is (N normal, mean 0, std).

    index, share: the map of the last dim; the noises of one feature's copies sum to zero.
    """

    std: float
    index: Index
    share: Coefficients


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One target tensor. ``row`` is the first target row that a narrowed plan covers; ``fresh`` marks, per dim, the
    copies whose moments start at zero; ``seed`` drives fill and noise."""

    name: str
    spec: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    fill: Fill | None = None
    noise: Noise | None = None
    fresh: tuple[NDArray[np.bool_] | None, ...] = ()
    seed: int = 0
    row: int = 0

    def narrow(self, start: int, stop: int) -> TensorPlan:
        """The plan of rows [start, stop) of dim 0. Raises ValueError for rows that the tensor lacks."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {start}:{stop} of {self.shape[0]}")
        rows = slice(start, stop)
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            terms=tuple(Term(t.source, (t.dims[0][rows], *t.dims[1:])) for t in self.terms),
            fresh=tuple(f[rows] if i == 0 and f is not None else f for i, f in enumerate(self.fresh)),
            row=self.row + start,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The source tensors that the plan reads, each once."""
        return tuple(dict.fromkeys(term.source for term in self.terms))

    def parts(self) -> Iterator[bytes]:
        """Everything that determines the result, for a digest."""
        yield repr((self.name, self.spec, self.shape, self.fill, self.seed, self.row)).encode()
        for term in self.terms:
            yield term.source.encode()
            for dim in term.dims:
                for array in (dim.index, *dim.param, *dim.grad):
                    yield array.tobytes() + b"|"
        if self.noise is not None:
            yield repr(self.noise.std).encode() + self.noise.index.tobytes() + self.noise.share.tobytes()
        for mask in self.fresh:
            yield b"-" if mask is None else mask.tobytes()


@dataclass(frozen=True)
class Exactness:
    """What a plan keeps, derived from its maps: an empty tuple of reasons means exact.

    function: why logits change. moments: why the optimizer's moments are not those of the grown network. lossy: the
    reasons among ``function`` by which an operator misses what it promises, so that the user has to accept them.
    """

    function: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """A whole growth. ``tensors`` in the target model's order, tied copies absent and named in ``aliases``
    (absent name -> kept name); ``config`` is the target's; ``recipe`` says which operators and seed made it."""

    tensors: dict[str, TensorPlan]
    config: dict[str, Any]
    aliases: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    exactness: Exactness = field(default_factory=Exactness)
    warnings: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 over every index, coefficient and fill: equal digests give equal checkpoints."""
        h = hashlib.sha256()
        for plan in self.tensors.values():
            for part in plan.parts():
                h.update(part)
        return h.hexdigest()

    def fuse(self, first: GrowthPlan) -> GrowthPlan:
        """One plan for ``first`` then this one, bit for bit the same as the two in sequence."""
        fused = {}
        for name, plan in self.tensors.items():
            terms = []
            for term in plan.terms:
                inner = first.tensors[term.source]
                if inner.fill or inner.noise or any(f is not None for f in inner.fresh):
                    raise UnsupportedGrowth(
                        f"fusing two growths: the first one fills, adds noise to or resets moments of {inner.name}, "
                        f"which an index list cannot express.\nRun the two growths one after the other, or put the "
                        f"symmetry breaker into the second."
                    )
                terms += [
                    Term(t.source, tuple(b.after(a) for a, b in zip(t.dims, term.dims, strict=True)))
                    for t in inner.terms
                ]
            fused[name] = replace(plan, terms=tuple(terms))
        return replace(
            self,
            tensors=fused,
            recipe={"first": first.recipe, "then": self.recipe},
            exactness=Exactness(
                first.exactness.function + self.exactness.function,
                first.exactness.moments + self.exactness.moments,
                first.exactness.lossy + self.exactness.lossy,
            ),
            warnings=tuple(dict.fromkeys(first.warnings + self.warnings)),
        )


def identity_plan(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> GrowthPlan:
    """The growth that changes nothing: what a change of format, stage or world size alone is."""
    tensors = {
        name: TensorPlan(name, "", shape, (Term(name, tuple(Dim(np.arange(n)) for n in shape)),))
        for name, shape in shapes.items()
    }
    return GrowthPlan(tensors, config, recipe={"width": "identity", "depth": "identity"})
