"""The notation of the tables: which named axes a tensor has, in storage order, and whether it writes or reads each.

    spec := dims | dims "<-" dims | dims "->" dims
    dim  := atom | "(" product { "|" product } ")"     concatenation of row-major products
    atom := ["~"] axis

Dims left of ``<-`` (right of ``->``) are written, the others read; ``~`` flips one atom, or a whole dim when it stands
before the parenthesis. A tensor without an arrow only writes. ``embed <- (heads v)`` is an nn.Linear weight [out, in].

This module knows no tensors and no sizes; a spec it cannot parse is a ValueError, for specs are this project's data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"~?\([^()]*\)|~?\w+")


@dataclass(frozen=True)
class Atom:
    """One axis of a tensor; ``reads`` when the tensor collects the axis instead of spreading into it."""

    axis: str
    reads: bool


Product = tuple[Atom, ...]
Dim = tuple[Product, ...]
Spec = tuple[Dim, ...]


def _dim(token: str, reads: bool) -> Dim:
    flip = token.startswith("~")
    body = token.lstrip("~").strip("()")
    products = []
    for part in body.split("|"):
        atoms = part.split()
        if not atoms:
            raise ValueError(f"empty product in {token!r}")
        products.append(tuple(Atom(a.lstrip("~"), reads ^ flip ^ a.startswith("~")) for a in atoms))
    return tuple(products)


def _side(text: str, reads: bool, spec: str) -> tuple[Dim, ...]:
    tokens = _TOKEN.findall(text)
    if "".join(tokens).replace(" ", "") != text.replace(" ", ""):
        raise ValueError(f"cannot parse {text!r} in the spec {spec!r}")
    return tuple(_dim(token, reads) for token in tokens)


@lru_cache(maxsize=512)
def parse(spec: str) -> Spec:
    """The dims of a spec in storage order. Raises ValueError for text outside the grammar."""
    arrows = len(re.findall(r"<-|->", spec))
    if arrows > 1:
        raise ValueError(f"more than one arrow in the spec {spec!r}")
    if "<-" in spec:
        left, right = spec.split("<-")
        dims = _side(left, False, spec) + _side(right, True, spec)
    elif "->" in spec:
        left, right = spec.split("->")
        dims = _side(left, True, spec) + _side(right, False, spec)
    else:
        dims = _side(spec, False, spec)
    if not dims:
        raise ValueError(f"the spec {spec!r} has no dims")
    return dims


def shape(spec: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The tensor's shape when each axis has the size given."""
    return tuple(sum(math.prod(sizes[a.axis] for a in product) for product in dim) for dim in parse(spec))


def axes_of(spec: str) -> frozenset[str]:
    """Every axis that a spec names."""
    return frozenset(atom.axis for dim in parse(spec) for product in dim for atom in product)


def read_axes(spec: str) -> frozenset[str]:
    """The axes that a spec reads."""
    return frozenset(atom.axis for dim in parse(spec) for product in dim for atom in product if atom.reads)
