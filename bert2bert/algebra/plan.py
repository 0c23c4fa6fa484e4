"""A growth as data: for every target tensor, which entries of which source tensors it is made of, with what factor.

A `TensorPlan` is a set of `Term`s over a `Fill`. The terms fill disjoint parts of the target or, with ``sums``, add up.
Each dim of a term is an index into the source dim and two coefficients a position, one for parameters and one for
gradients. A plan narrowed to some rows needs only the source rows that those name. A plan may rest on other plans, in
place of checkpoints: two growths in one pass are the second resting on the first.

Imports no torch: a plan of a model of any size is a few index lists.
Refuses: rows that a tensor lacks (ValueError).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra.maps import Coefficients, Gather, Index

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Dim:
    """One dim of a term. index: [target] source position, -1 is silent, source + r takes row r of ``mix``
    [rows, source], a mixture of source positions. param, grad: [target] coefficients, None = all ones. new: the source
    tensor has no such dim; index is then 0 where the term writes."""

    index: Index
    param: Coefficients | None = None
    grad: Coefficients | None = None
    mix: Coefficients | None = None
    new: bool = False

    @classmethod
    def of(cls, gather: Gather) -> Dim:
        """The dim of a tensor that writes the axis (pass ``~gather`` for one that reads it)."""
        return cls(gather.index, gather.gain, gather.share, gather.mix)

    def __getitem__(self, rows: slice | Index) -> Dim:
        param, grad = (None if c is None else c[rows] for c in (self.param, self.grad))
        return Dim(self.index[rows], param, grad, self.mix, self.new)

    def where(self, keep: Mask) -> Dim:
        """The same dim, silent on the positions that are not kept."""
        return replace(self, index=np.where(keep, self.index, -1))

    @cached_property
    def full(self) -> bool:
        """Whether no target position is silent."""
        return bool((self.index >= 0).all())


@dataclass(frozen=True, eq=False)
class Term:
    """The entries that come from one source tensor: the outer product of the dims' positions that are not silent.

    origin: which of the checkpoints (or plans) that the growth rests on has the tensor. given: values in place of a
    source tensor, in its coordinates; their moments are zero."""

    source: str
    dims: tuple[Dim, ...]
    origin: int = 0
    given: NDArray[Any] | None = None


@dataclass(frozen=True)
class Fill:
    """The values where no term writes: ``kind`` 'normal' (mean 0, std), 'ones' (times scale) or 'zeros'; moments are 0
    there. period: normal rows repeat after this many, 0 = never."""

    kind: str
    std: float = 0.0
    scale: float = 1.0
    period: int = 0


@dataclass(frozen=True, eq=False)
class Noise:
    """Normal noise of this standard deviation on one dim, which reads: what a copy is given, the next copy of the same
    feature loses, so that no output changes. sibling: [target positions of the dim] the next copy, round and round."""

    std: float
    dim: int
    sibling: Index


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One target tensor.

    sums: terms add up instead of filling disjoint parts. blank: per dim, positions where the fill is zero. fresh: per
    dim, positions whose moments start at zero; reset: all moments do, and the step count. seed: of fill and noise.
    row: the first target row that a narrowed plan covers, ``whole`` the plan that it was cut from (kept only where a
    mixture is computed, in blocks of rows that do not depend on the cut).
    """

    name: str
    spec: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    fill: Fill | None = None
    noise: Noise | None = None
    blank: tuple[Mask | None, ...] = ()
    fresh: tuple[Mask | None, ...] = ()
    sums: bool = False
    reset: bool = False
    seed: int = 0
    row: int = 0
    whole: TensorPlan | None = None

    def narrow(self, start: int, stop: int) -> TensorPlan:
        """The plan of rows [start, stop) of dim 0. Raises ValueError for rows that the tensor lacks."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {start}:{stop} of {self.shape[0]}")
        rows = slice(start, stop)
        blank, fresh = (
            tuple(m[rows] if i == 0 and m is not None else m for i, m in enumerate(masks))
            for masks in (self.blank, self.fresh)
        )
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            terms=tuple(replace(t, dims=(t.dims[0][rows], *t.dims[1:])) for t in self.terms),
            blank=blank,
            fresh=fresh,
            row=self.row + start,
            whole=(self.whole or self) if self.mixes else None,
        )

    @property
    def mixes(self) -> bool:
        """Whether some entries mix several source entries."""
        return any(d.mix is not None for t in self.terms for d in t.dims)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source tensors that the plan reads, each once."""
        return tuple(dict.fromkeys(term.source for term in self.terms if term.given is None))

    def parts(self, mixed: dict[int, bytes]) -> Iterator[bytes]:
        """Everything that determines the result, for a digest. mixed: of mixtures by id, which many terms may share."""
        flags = (self.name, self.spec, self.shape, self.fill, self.seed, self.row, self.sums, self.reset)
        yield repr(flags).encode()
        for term in self.terms:
            yield f"{term.source}/{term.origin}".encode()
            if term.given is not None:
                yield repr((term.given.dtype.str, term.given.shape)).encode() + term.given.tobytes()
            for dim in term.dims:
                for array in (dim.index, dim.param, dim.grad):
                    yield b"-" if array is None else array.tobytes() + b"|"
                if dim.mix is not None and id(dim.mix) not in mixed:
                    mixed[id(dim.mix)] = hashlib.sha256(dim.mix.tobytes()).digest()
                yield b"-" if dim.mix is None else mixed[id(dim.mix)]
        if self.noise is not None:
            yield repr((self.noise.std, self.noise.dim)).encode() + self.noise.sibling.tobytes()
        for mask in (*self.blank, None, *self.fresh):
            yield b"-" if mask is None else mask.tobytes()


@dataclass(frozen=True)
class Exactness:
    """What a plan keeps, derived from its maps: an empty tuple of reasons means exact.

    function: why logits change. moments: why the optimizer's moments are not those of the grown network. lossy: the
    reasons among ``function`` by which an operator misses what it promises, so that the user has to accept them.
    softmax: those by which only probabilities change, for the logits of old tokens stay.
    """

    function: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()
    softmax: tuple[str, ...] = ()

    def __add__(self, other: Exactness) -> Exactness:
        def join(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(a + b))

        return Exactness(
            join(self.function, other.function),
            join(self.moments, other.moments),
            join(self.lossy, other.lossy),
            join(self.softmax, other.softmax),
        )

    @property
    def logits(self) -> bool:
        """Whether the logits of the source's tokens stay."""
        return set(self.function) <= set(self.softmax)


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """A whole growth. ``tensors`` in the target model's order, tied copies absent and named in ``aliases``
    (absent name -> kept name); ``config`` is the target's; ``recipe`` says which operators and seed made it;
    ``moments``: the policy, 'exact', 'carried', 'reset' or 'asymmetric'; ``before``: the plans that it rests on, none
    where it reads checkpoints."""

    tensors: dict[str, TensorPlan]
    config: dict[str, Any]
    aliases: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    exactness: Exactness = field(default_factory=Exactness)
    moments: str = "exact"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    before: tuple[GrowthPlan, ...] = ()

    @cached_property
    def leaves(self) -> int:
        """How many checkpoints the growth reads."""
        own = {t.origin for p in self.tensors.values() for t in p.terms}
        return sum(p.leaves for p in self.before) if self.before else max(own, default=0) + 1

    def roots(self, name: str) -> tuple[tuple[int, str], ...]:
        """The (checkpoint, tensor) pairs that a target tensor is made of, each once."""
        found: list[tuple[int, str]] = []
        starts = np.cumsum([0, *(p.leaves for p in self.before)])
        for term in self.tensors[name].terms:
            if term.given is not None:
                continue
            if not self.before:
                found.append((term.origin, term.source))
            else:
                inner = self.before[term.origin].roots(term.source)
                found += [(int(starts[term.origin]) + i, source) for i, source in inner]
        return tuple(dict.fromkeys(found))

    def digest(self) -> str:
        """SHA-256 over every index, coefficient and fill: equal digests give equal checkpoints."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        h, mixed = hashlib.sha256(), dict[int, bytes]()
        for before in self.before:
            h.update(before.digest().encode())
        for plan in self.tensors.values():
            for part in plan.parts(mixed):
                h.update(part)
        return h.hexdigest()
