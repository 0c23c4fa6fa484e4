"""Growth of one axis as a pair of maps (E, L) with L E = I: features spread as x' = E x, readers collect x = L x'.

A `Gather` is such a pair in which every target feature copies at most one source feature, or one of a few mixtures of
source features, stored as an index and two coefficient vectors instead of two matrices. ``~m`` is the axis seen from a
reader (spread with L^T, collect with E^T), ``a * b`` is the row-major product of two axes and ``a | b`` their
concatenation.

Refuses: products and concatenations of mixtures (ValueError; no operator needs them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Coefficients = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gather:
    """One axis's (E, L), target x source: E[t, index[t]] = gain[t] and L[index[t], t] = share[t].

    index: [target] source feature, -1 for a target feature that copies none, source + r for row r of ``mix``
    [rows, source], a mixture of source features. gain, share: [target], None = all ones.
    """

    index: Index
    source: int
    gain: Coefficients | None = None
    share: Coefficients | None = None
    mix: Coefficients | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __invert__(self) -> Gather:
        return replace(self, gain=self.share, share=self.gain)

    def __mul__(self, other: Gather) -> Gather:
        alone = (other if self.mix is not None else self) if (self.mix is not None or other.mix is not None) else None
        if alone is not None and (alone.source, len(alone), alone.mix) != (1, 1, None):
            raise ValueError("a mixture of features multiplies only with an axis of size one")
        both = (self.index[:, None] >= 0) & (other.index[None, :] >= 0)
        index = np.where(both, self.index[:, None] * other.source + other.index[None, :], -1).reshape(-1)
        gain, share = _outer(self, other, "gain"), _outer(self, other, "share")
        return Gather(index, self.source * other.source, gain, share, other.mix if self.mix is None else self.mix)

    def __or__(self, other: Gather) -> Gather:
        if self.mix is not None or other.mix is not None:
            raise ValueError("mixtures of features do not concatenate")
        index = np.concatenate([self.index, np.where(other.index >= 0, other.index + self.source, -1)])
        return Gather(index, self.source + other.source, _joined(self, other, "gain"), _joined(self, other, "share"))

    @cached_property
    def counts(self) -> Index:
        """[source] how many target features copy each source feature."""
        plain = self.index[(self.index >= 0) & (self.index < self.source)]
        return np.bincount(plain, minlength=self.source)

    @property
    def is_identity(self) -> bool:
        """Whether the axis is left alone."""
        return len(self) == self.source and self.gain is None and self.share is None and bool(
            np.array_equal(self.index, np.arange(self.source))
        )  # fmt: skip

    @property
    def is_uniform(self) -> bool:
        """Whether every source feature has the same number of copies, at least one, and there is nothing else."""
        plain = bool(((self.index >= 0) & (self.index < self.source)).all())
        return plain and bool((self.counts == self.counts[0]).all()) and self.counts[0] > 0

    @property
    def is_even(self) -> bool:
        """Whether the copies of a feature are spread and collected alike, so that nothing tells them apart."""
        ok = (self.index >= 0) & (self.index < self.source)
        index = self.index[ok]
        for coefficient in (self.gain, self.share):
            if coefficient is not None:
                one = np.zeros(self.source)
                one[index] = coefficient[ok]
                if not np.array_equal(one[index], coefficient[ok]):
                    return False
        return True

    def dense(self) -> tuple[Coefficients, Coefficients]:
        """E [target, source] and L [source, target] as matrices, for laws and small tests."""
        known = np.eye(self.source) if self.mix is None else np.concatenate([np.eye(self.source), self.mix])
        rows = np.where((self.index >= 0)[:, None], known[self.index], 0.0)
        gain, share = (_full(c, len(self))[:, None] for c in (self.gain, self.share))
        return rows * gain, (rows * share).T


def identity(size: int) -> Gather:
    """The map that leaves an axis of this size alone."""
    return Gather(np.arange(size, dtype=np.int64), size)


def scalar(factor: float) -> Gather:
    """The map of an axis of size one that only multiplies: E = [factor], L = [1 / factor]."""
    return Gather(np.zeros(1, dtype=np.int64), 1, np.array([factor]), np.array([1.0 / factor]))


def copies(index: Iterable[int], source: int, weights: Sequence[float] | Coefficients | None = None) -> Gather:
    """Copy features by index; each copy's share is its weight among its siblings (equal weights: 1/count).

    Every source feature must be copied at least once, else no L with L E = I exists: ValueError.
    """
    idx = index.astype(np.int64) if isinstance(index, np.ndarray) else np.fromiter(index, dtype=np.int64)
    counts = np.bincount(idx, minlength=source)
    if len(counts) != source or (counts == 0).any():
        raise ValueError(f"each of the {source} source features needs a copy; without: {np.nonzero(counts == 0)[0]}")
    if (counts == 1).all():
        return Gather(idx, source)
    if weights is None:
        return Gather(idx, source, share=1.0 / counts[idx])
    w = np.asarray(weights, dtype=np.float64)
    total = np.bincount(idx, weights=w, minlength=source)
    return Gather(idx, source, share=w / total[idx])


def corner(source: int, target: int) -> Gather:
    """Source features first, the rest silent (to be filled); a target as wide as the source gives the identity."""
    index = np.full(target, -1, dtype=np.int64)
    index[:source] = np.arange(source)
    return Gather(index, source)


def _full(values: Coefficients | None, size: int) -> Coefficients:
    return np.ones(size) if values is None else values


def _outer(a: Gather, b: Gather, name: str) -> Coefficients | None:
    mine, theirs = getattr(a, name), getattr(b, name)
    if mine is None and theirs is None:
        return None
    product: Coefficients = (_full(mine, len(a))[:, None] * _full(theirs, len(b))[None, :]).reshape(-1)
    return product


def _joined(a: Gather, b: Gather, name: str) -> Coefficients | None:
    mine, theirs = getattr(a, name), getattr(b, name)
    if mine is None and theirs is None:
        return None
    return np.concatenate([_full(mine, len(a)), _full(theirs, len(b))])
