"""Width operators: from the sizes of two models to one map per axis (and, for heads and neurons, per source layer).

* ``fpi``: function-preserving initialisation, bert2BERT (Chen et al., ACL 2022), equation of EXPN; Net2Net's rule.
* ``aki``: advanced knowledge initialisation, the same paper: fresh heads and neurons come from the layer above.
* ``direct``: corner copy, fresh entries drawn at random (the paper's DirectCopy baseline).
* ``random``: nothing is copied, the scratch baseline.

One hidden map serves the whole network, for every residual addition sums features that must stay aligned. Choices are
drawn from the explicit seed alone, so that aki and fpi with one seed copy the same features.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bert2bert.maps import Gather, copies, corner, identity

CHOICES = ("balanced", "random", "left")


@dataclass(frozen=True)
class Width:
    """What a width operator decides. maps[axis]: one map, or one per source layer for the unit axes; axes left out stay
    as they are. borrow: where fresh units come from, as an offset to their layer (0: their own, 1: the layer above).
    copy: False when nothing is copied at all."""

    name: str
    maps: Mapping[str, Gather | tuple[Gather, ...]] = field(default_factory=dict)
    borrow: int = 0
    copy: bool = True

    def at(self, axis: str, layer: int | None, size: int) -> Gather:
        """The map of an axis in a source layer; the identity of this size where the operator says nothing."""
        found = self.maps.get(axis)
        if found is None:
            return identity(size)
        return found if isinstance(found, Gather) else found[layer or 0]


def fpi(
    source: Mapping[str, int], target: Mapping[str, int], units: tuple[str, ...], seed: int, choice: str = "balanced"
) -> Width:
    """Copy every grown axis; readers share a feature's weight evenly among its copies.

    choice: how fresh features pick their original. 'balanced': each original as often as any other, plus or minus one;
    'random': uniform with replacement, as the paper prints it; 'left': left to right, round and round.
    """
    maps: dict[str, Gather | tuple[Gather, ...]] = {}
    for axis, size in source.items():
        if target[axis] == size or axis == "layers":
            continue
        draws = range(source["layers"]) if axis in units else (0,)
        made = [copies(_index(size, target[axis], choice, (seed, zlib.crc32(axis.encode()), d)), size) for d in draws]
        maps[axis] = tuple(made) if axis in units else made[0]
    return Width("fpi", maps)


def aki(
    source: Mapping[str, int], target: Mapping[str, int], units: tuple[str, ...], seed: int, choice: str = "balanced"
) -> Width:
    """fpi whose fresh heads and neurons are those of the next layer up (the top layer uses its own)."""
    return Width("aki", fpi(source, target, units, seed, choice).maps, borrow=1)


def direct(source: Mapping[str, int], target: Mapping[str, int], units: tuple[str, ...], seed: int) -> Width:
    """The source in a corner of every tensor; the entries around it are filled at random."""
    return Width("direct", {axis: corner(n, target[axis]) for axis, n in source.items() if target[axis] != n})


def random(source: Mapping[str, int], target: Mapping[str, int], units: tuple[str, ...], seed: int) -> Width:
    """Nothing of the source: the initialisation of training from scratch."""
    return Width("random", copy=False)


WIDTHS = {"fpi": fpi, "aki": aki, "direct": direct, "random": random}


def _index(source: int, target: int, choice: str, seed: tuple[int, ...]) -> np.ndarray:
    fresh = target - source
    rng = np.random.default_rng(seed)
    if choice == "random":
        extra = rng.integers(0, source, fresh)
    elif choice == "left":
        extra = np.arange(fresh) % source
    else:
        rounds, rest = divmod(fresh, source)
        extra = np.concatenate([np.tile(np.arange(source), rounds), np.sort(rng.permutation(source)[:rest])])
    return np.concatenate([np.arange(source), extra]).astype(np.int64)
