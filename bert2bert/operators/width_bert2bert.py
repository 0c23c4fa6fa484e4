"""Width operators of bert2BERT (Chen et al., ACL 2022) and its baselines: fpi, aki, direct, random.

One hidden map serves the whole network, for every residual addition sums features that must stay aligned. Choices are
drawn from the explicit seed alone, so that aki and fpi with one seed copy the same features.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Literal

import numpy as np

from bert2bert.algebra.maps import Gather, copies, corner
from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import Copying, Norms, Pair, Reasons, Width
from bert2bert.operators.registry import operator

Choice = Literal["balanced", "random", "left"]
_PAPER = "Chen et al., bert2BERT, ACL 2022"


@operator(
    "width",
    "fpi",
    paper=_PAPER,
    keeps="the function, where every feature of a normalised axis has equally many copies",
    copies=True,
)
def fpi(pair: Pair, *, choice: Choice = "balanced") -> Width:
    """Function-preserving initialisation: U[i, j] = W[g_in(i), g_out(j)] / count of g_in(i).

    Fresh features copy old ones, and readers share a feature's weight evenly among its copies. choice, how fresh
    features pick their original: 'balanced', each original as often as any other, plus or minus one; 'random', uniform
    with replacement, as the paper prints it; 'left', left to right, round and round.
    """
    maps: dict[str, Gather | tuple[Gather, ...]] = {}
    for axis in pair.grown:
        small, large, key = pair.small[axis], pair.large[axis], zlib.crc32(axis.encode())
        made = [copies(index(small, large, choice, pair.rng(key, d)), small) for d in range(pair.draws(axis))]
        maps[axis] = tuple(made) if len(made) > 1 else made[0]
    return Width("fpi", maps)


@operator("width", "aki", paper=_PAPER, keeps="nothing exactly: fresh units know more", moments="carried", copies=True)
def aki(pair: Pair, *, choice: Choice = "balanced", source: Literal["above", "below"] = "above") -> Width:
    """Advanced knowledge initialisation: fpi whose fresh heads and neurons are those of the next layer up, with what
    they write and what reads them; the top layer uses its own.

    source=below is the paper's ablation, worse there. In grouped attention fresh query heads stay inside their group.
    With --depth interpolate this is AKI-Pro (AquilaMoE).
    """
    maps = fpi(pair, choice=choice).maps
    where = "above" if source == "above" else "below"
    stream = ("embed",) * bool(pair.output_biases)  # hidden entries are borrowed in these biases alone
    units = [a for a in (*pair.table.sizes.units, *stream) if a in pair.grown]
    if not units or pair.layers == 1:
        return Width("aki", maps)
    return Width(
        "aki",
        maps,
        copying=Copying(borrow=1 if source == "above" else -1),
        reasons=Reasons(
            function=(f"aki: fresh features on {', '.join(units)} come from the layer {where}",),
            moments=("borrowed units carry the moments of the layer they come from",),
        ),
    )


@operator(
    "width", "direct", paper=f"{_PAPER}: DirectCopy", keeps="nothing exactly", moments="asymmetric", head_size=True
)
def direct(pair: Pair) -> Width:
    """The source in a corner of every tensor; the entries around it are drawn at random."""
    if not pair.grown:
        return Width("direct")
    reasons = Reasons(
        function=(f"direct: entries outside the source's corner are drawn at random on {', '.join(pair.grown)}",),
        moments=("moments outside the source's corner start at zero",),
    )
    maps = {axis: corner(pair.small[axis], pair.large[axis]) for axis in pair.grown}
    return Width("direct", maps, norms=Norms(averaged=True), reasons=reasons)


@operator("width", "random", paper="training from scratch", keeps="nothing", moments="reset", head_size=True)
def random(pair: Pair) -> Width:
    """Nothing of the source: the initialisation of training from scratch."""
    return Width("random", copying=Copying(nothing=True))


@operator("breaker", "uneven", paper="Wang et al., LEMON, ICLR 2024", keeps="the function")
def uneven(pair: Pair, width: Width) -> Width:
    """The same copies with unequal shares (another left inverse): still exact, no longer symmetric."""

    def other(axis: str, i: int, gather: Gather) -> Gather:
        if gather.mix is not None or (gather.counts == 0).any() or gather.gain is not None:
            raise UnsupportedGrowth(
                f"--break-symmetry uneven with --width {width.name}: its map of {axis} is not made of copies alone; "
                f"use --break-symmetry noise"
            )
        rng = np.random.default_rng((pair.seed, 1, i, len(axis)))
        return copies(gather.index, gather.source, rng.uniform(0.5, 1.5, len(gather)))

    maps = {
        axis: other(axis, 0, m) if isinstance(m, Gather) else tuple(other(axis, i, g) for i, g in enumerate(m))
        for axis, m in width.maps.items()
    }
    return replace(width, maps=maps)


@operator("breaker", "noise", paper="Samragh et al., HyperCloning, 2024", keeps="the function")
def noise(pair: Pair, width: Width, *, scale: float = 0.1) -> Width:
    """Noise in the null space: what one copy is given, the next copy loses, so no output changes, whatever its size.

    scale: of the config's initializer_range; small beside the weights, large beside rounding.
    """
    return replace(width, noise=scale)


def index(source: int, target: int, choice: str, rng: np.random.Generator) -> np.ndarray:
    """Old features first, then the originals of the fresh ones."""
    fresh = target - source
    if choice == "random":
        extra = rng.integers(0, source, fresh)
    elif choice == "left":
        extra = np.arange(fresh) % source
    else:
        rounds, rest = divmod(fresh, source)
        extra = np.concatenate([np.tile(np.arange(source), rounds), np.sort(rng.permutation(source)[:rest])])
    return np.concatenate([np.arange(source), extra]).astype(np.int64)
