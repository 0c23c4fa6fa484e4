"""Width operators that only copy: tile, Net2Net, HyperCloning, and the block-diagonal widths of staged training.

They keep the function where every feature of a normalised axis has equally many copies, on units always.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.algebra.maps import Gather
from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import Copying, Pair, Width
from bert2bert.operators.registry import operator
from bert2bert.operators.width_bert2bert import fpi

_KEEPS = "the function, where every feature of a normalised axis has equally many copies"


@operator("width", "tile", paper="the common form of copying; FPI left to right", keeps=_KEEPS, copies=True)
def tile(pair: Pair) -> Width:
    """Every grown axis repeated whole, then from its start: U[i, j] = W[i mod d_in, j mod d_out] / count of i mod d_in.

    The same as fpi:choice=left.
    """
    return replace(fpi(pair, choice="left"), name="tile")


@operator("width", "net2net", paper="Chen, Goodfellow, Shlens, Net2Net, ICLR 2016", keeps=_KEEPS, copies=True)
def net2net(pair: Pair) -> Width:
    """Net2WiderNet: fresh features copy old ones drawn at random, U[i, j] = W[g(i), g(j)] / |{x: g(x) = g(i)}|.

    The same as fpi:choice=random; exact on neurons and heads, which no norm sees. The paper's small noise, where no
    dropout tells copies apart, is --break-symmetry noise, which here changes no output.
    """
    return replace(fpi(pair, choice="random"), name="net2net")


@operator(
    "width",
    "hyperclone",
    paper="Samragh et al., HyperCloning, 2024",
    keeps=_KEEPS,
    copies=True,
    head_size=True,
)
def hyperclone(pair: Pair, *, noise: float = 0.0) -> Width:
    """Every grown axis tiled, a head's own size included: blocks of W / n, biases and norms repeated.

    A head of size d grown to d' has its query divided by the number of copies and multiplied by √(d'/d), that is
    √(d/d') where d divides d', so that scores stay as they are. noise: of the config's initializer_range, pairs that
    cancel on a feature's copies (W/2 + N, W/2 - N), which tell copies apart and change no output.
    """
    maps = dict(tile(pair).maps)
    if "qk" in maps and isinstance(qk := maps["qk"], Gather):
        maps["qk"] = replace(qk, gain=1.0 / qk.counts[qk.index], share=None)
    return Width("hyperclone", maps, noise=noise)


@operator("width", "staged", paper="Shen et al., Staged Training, ICML 2022", keeps="the function", copies=True)
def staged(pair: Pair) -> Width:
    """Block-diagonal: W -> diag(W, W), biases, norms and embeddings repeated, what the head reads divided by k.

    Every grown axis must grow by the same whole factor k. The moments are the true gradient's, G / k in all blocks;
    the authors' code leaves them zero off the diagonal.
    """
    times = {axis: pair.large[axis] / pair.small[axis] for axis in pair.grown}
    wrong = len(set(times.values())) > 1 or any(not t.is_integer() for t in times.values())
    if wrong or {"kv", "group"} <= set(times):
        found = ", ".join(f"{axis} {pair.small[axis]} -> {pair.large[axis]}" for axis in times)
        raise UnsupportedGrowth(
            f"--width staged makes blocks, so every grown axis must grow by the same whole factor, in grouped "
            f"attention by more key-value heads or by larger groups, not both; found {found}.\n"
            f"Double each of them, or use --width tile"
        )
    return replace(tile(pair), name="staged", copying=Copying(blocks=int(max(times.values(), default=1))))
