"""LiGO (Wang et al., ICLR 2023): width and depth maps that were fitted on the language-model loss, applied as a plan.

A fit starts from tiles and stacked layers (fpi from left to right, stack) and learns two sorts of matrices:

* ``S [fresh, source]`` for every product of axes that grows: an old feature stays, a fresh one is a mixture of all old
  ones, W' = [W; S W]. One S serves the whole residual stream; heads (as queries, keys and values) and neurons have one
  for each source layer. What reads a feature has the same S times the shares of the start.
* ``w [target layers, source layers]`` for every module of the layers: a target layer is a weighted sum of all source
  layers, once widened.

Rotary positions leave the inside of a head alone: S then mixes whole heads. This module knows the maps as arrays, and
the plan that follows from them; `commands.learn` fits them. Refuses files that no fit has written, that are damaged
(`InvalidCheckpoint`) or that belong to a growth between other sizes (`UnsupportedGrowth`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import mul, or_
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Gather, copies
from bert2bert.algebra.plan import Dim, Term
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Copying, Layer, Norms, Pair, Reasons, Width
from bert2bert.operators.registry import OPERATORS, operator
from bert2bert.operators.width_bert2bert import index
from bert2bert.tables import Parameter

Maps = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]


@operator(
    "width",
    "ligo",
    paper="Wang et al., LiGO, ICLR 2023",
    keeps="nothing exactly: it is fitted to lower the loss",
    needs="maps from `bert2bert learn`",
    moments="reset",
    head_size=True,
)
def ligo(pair: Pair, *, maps: str = "") -> Width:
    """Learned maps for width and depth at once: W'_i = sum_j w[i, j] B_out W_j A_in, B = [I; S], A = B times shares.

    maps: the file of a fit, `bert2bert learn SOURCE --config TARGET --data BINS --output FILE`: about 100 steps on the
    loss of the grown model. S mixes old features into fresh ones, w mixes layers; no --depth beside it. A file gives
    the same model bit for bit, always. It is where a new run starts: moments are zero, so warm the rate up.
    """
    if not maps:
        raise InvalidConfig(
            "--width ligo needs the maps of a fit: make them with `bert2bert learn SOURCE --config TARGET --data BINS "
            "--output FILE`, then say --width ligo:maps=FILE"
        )
    found, about = load(Path(maps))
    if about["model_type"] != pair.table.model_type:
        raise UnsupportedGrowth(
            f"--width ligo: {maps} was fitted for a {about['model_type']}, this is a {pair.table.model_type}; fit its "
            f"own maps with bert2bert learn"
        )
    for axis in (*pair.grown, *pair.table.sizes.depth):
        sizes, fitted = [pair.small[axis], pair.large[axis]], about["axes"][axis]
        if fitted != sizes:
            raise UnsupportedGrowth(
                f"--width ligo: {maps} was fitted for {axis} {fitted[0]} -> {fitted[1]}, this growth is {sizes[0]} -> "
                f"{sizes[1]}; fit its own maps with bert2bert learn, or choose that target"
            )
    return frozen(pair, found)


def frozen(pair: Pair, maps: Maps) -> Width:
    """The width that learned maps make; it covers the depth too."""
    scheme, known = Scheme(pair), Known(maps)
    return replace(
        scheme.start,
        copying=Copying(terms=lambda build, p: scheme.terms(build, p, known)),
        reasons=Reasons(
            function=("ligo: maps of features and layers are learned to lower the loss, not to keep the function",),
            moments=("second moments of sums of features and layers are not determined by those of the summands",),
        ),
    )


@dataclass(frozen=True, eq=False)
class Part:
    """One product of axes in a dim of a tensor. start: its map before the fit; key: the matrix S that is learned, ''
    where nothing is; fresh: the positions (blocks of ``repeat`` features each) that are mixtures by its rows."""

    key: str
    start: Gather
    fresh: Mask
    repeat: int


class Known:
    """Learned maps by name, and the dims made of them: tensors and layers share the arrays."""

    def __init__(self, maps: Maps) -> None:
        self.maps = {name: np.asarray(array, dtype=np.float64) for name, array in maps.items()}
        self.dims: dict[tuple[str, ...], Dim] = {}

    def __getitem__(self, key: str) -> NDArray[np.float64]:
        if key not in self.maps:
            raise UnsupportedGrowth(
                f"--width ligo: the file of maps has none named {key!r}, so it was fitted for another architecture; "
                f"fit this one's with bert2bert learn"
            )
        return self.maps[key]


class Scheme:
    """What a growth learns: the names and shapes of its maps, where they start, and how tensors are made of them."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.table = pair, pair.table
        rng = np.random.default_rng(0)  # 'left' draws nothing: the start follows from the sizes alone
        sizes = {axis: (pair.small[axis], pair.large[axis]) for axis in pair.grown}
        maps = {axis: copies(index(small, large, "left", rng), small) for axis, (small, large) in sizes.items()}
        self.start = Width("ligo", maps, norms=Norms(averaged=True))
        stack = OPERATORS["depth"]["stack"].make
        self.stacked = {axis: list(stack(pair, pair.small[axis], pair.large[axis])) for axis in self.table.sizes.depth}

    def builder(self, originals: Mapping[str, Parameter]) -> Builder:
        """The builder of the growth that the fit starts from. originals: the source's parameters."""
        return Builder(self.pair, self.start, {a: [*map(Layer, rows)] for a, rows in self.stacked.items()}, originals)

    def initial(self, build: Builder, parameters: Mapping[str, Parameter], noise: float, seed: int) -> dict[str, Any]:
        """Every map at its start, float64: S selects what fpi copies, w what stack does. noise: the length of the
        random vector added to every row of S, without which copies would stay copies."""
        found: dict[str, Any] = {}
        rng = np.random.default_rng(seed)
        for p in parameters.values():
            if key := self.depth_key(p):
                found.setdefault(key, np.eye(self.pair.small[p.depth])[self.stacked[p.depth]])
            for name, layer in self.sources(build, p):
                for part in (part for dim in self.parts(build, p, layer) if name for part in dim):
                    if part.key and part.key not in found:
                        rows = part.start.index[:: part.repeat][part.fresh] // part.repeat
                        size = part.start.source // part.repeat
                        noises = rng.normal(scale=noise / np.sqrt(size), size=(len(rows), size))
                        found[part.key] = np.eye(size)[rows] + noises
        return found

    def depth_key(self, p: Parameter) -> str:
        """The name of the matrix w of a tensor's module, '' where layers are not mixed."""
        if p.layer is None or self.pair.small[p.depth] == self.pair.large[p.depth]:
            return ""
        return p.pattern.replace("{" + p.depth + "}", p.depth).removesuffix(".weight").removesuffix(".bias")

    def sources(self, build: Builder, p: Parameter) -> list[tuple[str, int | None]]:
        """The source tensors that a target tensor may be made of, and their layers."""
        layers = range(self.pair.small[p.depth]) if self.depth_key(p) else (p.layer,)
        return [(p.at(layer), layer) for layer in layers if p.at(layer) in build.originals]

    def parts(self, build: Builder, p: Parameter, layer: int | None) -> list[list[Part]]:
        """Dim by dim, the products that a tensor consists of, where it comes from a source layer."""
        return [[self._part(build, p, product, layer) for product in dim] for dim in axes.parse(p.spec)]

    def _part(self, build: Builder, p: Parameter, product: axes.Product, layer: int | None) -> Part:
        gathers = [build.map(atom.axis, layer) for atom in product]
        start = reduce(mul, [~g if atom.reads else g for g, atom in zip(gathers, product, strict=True)])
        named = [(self.table.sizes.follows.get(a.axis, a.axis), a.reads) for a in product]
        live = [(axis, reads) for axis, reads in named if self.table.sizes.constants.get(axis) != 1]
        mixed = list(live)
        while mixed and mixed[-1][0] in self.table.sizes.fixed:
            mixed.pop()
        fresh = np.zeros(1, dtype=bool)
        for axis, _ in mixed:
            new = np.arange(self.pair.large[axis]) >= self.pair.small[axis]
            fresh = (fresh[:, None] | new[None, :]).reshape(-1)
        if not any(axis in self.pair.grown for axis, _ in mixed):
            return Part("", start, fresh, 1)
        units = {axis for axis, _ in mixed} & set(self.table.sizes.units) - self.table.sizes.aligned
        # One name for what writes a product and what reads it again: signs count from the first axis.
        name = " ".join("~" * (reads != live[0][1]) + axis for axis, reads in live)
        key = f"{p.depth}.{layer}.{name}" if units and layer is not None else name
        return Part(key, start, fresh, prod(self.pair.large[axis] for axis, _ in live[len(mixed) :]))

    def terms(self, build: Builder, p: Parameter, known: Known) -> tuple[Term, ...]:
        """A target tensor as a sum of mixtures, of every source layer with a weight that is not zero."""
        key, made = self.depth_key(p), []
        weights = known[key][p.layer] if key else None
        for name, layer in self.sources(build, p):
            weight = 1.0 if weights is None or layer is None else float(weights[layer])
            if not weight:
                continue
            first, *others = (self._dim(parts, known) for parts in self.parts(build, p, layer))
            if weight != 1.0:
                param = np.ones(len(first.index)) if first.param is None else first.param
                first = replace(first, param=param * weight)
            made.append(Term(name, (first, *others)))
        if key and not all(dim.full for term in made for dim in term.dims):
            raise UnsupportedGrowth(
                f"--width ligo sums layers, and {p.name} has entries that come from none: grow the axis with new "
                f"entries in a second growth"
            )
        return tuple(made)

    def _dim(self, parts: list[Part], known: Known) -> Dim:
        start = reduce(or_, [part.start for part in parts])
        if not any(part.key for part in parts):
            return Dim.of(start)
        name = tuple(part.key or str(part.start.source) for part in parts)
        if name not in known.dims:
            known.dims[name] = self._mixed(parts, known)
        return replace(known.dims[name], param=start.gain)

    def _mixed(self, parts: list[Part], known: Known) -> Dim:
        source, column = sum(part.start.source for part in parts), 0
        indexes: list[NDArray[np.int64]] = []
        mixes: list[NDArray[np.float64]] = []
        for part in parts:
            places = part.start.index + column
            if part.key:
                rows, want = known[part.key], (int(part.fresh.sum()), part.start.source // part.repeat)
                if rows.shape != want:
                    raise UnsupportedGrowth(
                        f"--width ligo: the map {part.key!r} has the shape {rows.shape}, this growth needs {want}; fit "
                        f"its own maps with bert2bert learn"
                    )
                if part.repeat > 1:
                    rows = np.kron(rows, np.eye(part.repeat)).astype(np.float64)
                before = source + sum(len(mix) for mix in mixes)
                places[np.repeat(part.fresh, part.repeat)] = before + np.arange(len(rows))
                around = (column, source - column - rows.shape[1])
                mixes.append(np.pad(rows, ((0, 0), around)) if any(around) else rows)
            indexes.append(places)
            column += part.start.source
        return Dim(np.concatenate(indexes), mix=mixes[0] if len(mixes) == 1 else np.concatenate(mixes))


def digest(maps: Maps) -> str:
    """SHA-256 of every map."""
    h = hashlib.sha256()
    for name in sorted(maps):
        array = np.ascontiguousarray(maps[name])
        h.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return h.hexdigest()


def save(path: Path, maps: Maps, about: Mapping[str, Any]) -> None:
    """One safetensors file: the maps, and in its header what is known about them."""
    from safetensors.numpy import save_file

    text = json.dumps({**about, "digest": digest(maps)})
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in maps.items()}, partial, {"bert2bert.commands.learn": text}
    )
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The maps of a file and what is known about them. Raises InvalidCheckpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get("bert2bert.commands.learn")
            maps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(
            f"{path}: not readable as a safetensors file of maps ({error}); make one with bert2bert learn"
        ) from None
    if text is None:
        raise InvalidCheckpoint(f"{path}: a safetensors file, but of no fit; make one with bert2bert learn")
    about: dict[str, Any] = json.loads(text)
    if (found := digest(maps)) != about["digest"]:
        raise InvalidCheckpoint(
            f"{path}: its maps have the digest {found}, its header says {about['digest']}: the file is damaged. Copy "
            f"it again, or fit the maps again with bert2bert learn"
        )
    return maps, about
