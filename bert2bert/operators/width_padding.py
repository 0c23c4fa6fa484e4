"""Width operators that pad the residual stream: LEMON and Gesmundo's composable expansions.

Before a norm inside the branches (pre-norm) a padded stream is exact at any width: zeros keep a root mean square up
to a factor, features equal to the mean keep the mean and, up to a factor, the variance; the factor goes into the norm's
gain, and its square into epsilon. The norm gives zeros at the padding, so whatever reads it there is free.

Refuses (`UnsupportedGrowth`) what no padding keeps: a norm that writes the stream itself (BERT, RoBERTa, ModernBERT),
zeros before a norm that subtracts the mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

import numpy as np

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Gather, copies, corner, identity, scalar
from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import Fresh, Norms, Pair, Reasons, Width
from bert2bert.operators.registry import operator
from bert2bert.tables import Table


@operator(
    "width",
    "lemon",
    paper="Wang et al., LEMON, ICLR 2024",
    keeps="the function, at any width in pre-norm models, at multiples in others",
)
def lemon(pair: Pair) -> Width:
    """Features repeated round and round; readers split a weight unevenly among copies, by random shares that sum to 1.

    A width D' that is not a multiple of D, where norms are inside the branches: k = floor(D' / D) copies of the
    stream, then its mean (LayerNorm) or zeros (RMSNorm); norm gains times sqrt(k D / D'), epsilon times k D / D', and
    weights that read the padding drawn at random, because the norms make it zero. Elsewhere, only multiples. Moments
    are exact where units alone grow, else carried over by the same maps.
    """
    maps: dict[str, Gather | tuple[Gather, ...]] = {}
    for axis in pair.grown:
        small, size, key = pair.small[axis], pair.large[axis], zlib.crc32(axis.encode())
        size -= size % small if axis == "embed" else 0
        rngs = [pair.rng(key, d) for d in range(pair.draws(axis))]
        made = [copies(np.arange(size) % small, small, rng.uniform(0.5, 1.5, size)) for rng in rngs]
        maps[axis] = tuple(made) if len(made) > 1 else made[0]
    width, stream = Width("lemon", maps), maps.get("embed")
    if isinstance(stream, Gather) and len(stream) < pair.large["embed"]:
        return _padded(pair, width, stream, mean=pair.table.norms.kind == "layer")
    return width


@operator(
    "width",
    "gesmundo",
    paper="Gesmundo and Maile, Composable Function-preserving Expansions, 2023",
    keeps="the function",
    needs="RMSNorm inside the branches to grow the hidden size; any model for the rest",
    moments="asymmetric",
    head_size=True,
)
def gesmundo(pair: Pair) -> Width:
    """The source in a corner, zeros where the new part would be read, random numbers elsewhere: one rule an axis.

    Neurons: new columns of W_2 zero. Heads, and the value size: new columns of W_O zero. Query and key size k -> k':
    W_K times sqrt(k' / k), its new rows zero. Hidden size h -> h': new entries of all that writes the stream zero, norm
    gains times sqrt(h / h'), epsilon times h / h'. Layers: --depth insert_identity.
    """
    maps = {axis: corner(pair.small[axis], pair.large[axis]) for axis in pair.grown}
    if "qk" in maps and pair.table.sizes.scales.get("tau") == "qk":
        root = np.full(pair.large["qk"], sqrt(pair.large["qk"] / pair.small["qk"]))
        maps["qk"] = replace(maps["qk"], gain=1.0 / root, share=root)
    silent = frozenset(f"~{axis}" for axis in maps if axis != "embed")
    reason = "gesmundo: moments of new entries start at zero, though some have a gradient at once"
    width = Width("gesmundo", maps, fresh=Fresh(blank=silent), reasons=Reasons(moments=(reason,) if maps else ()))
    return _padded(pair, width, identity(pair.small["embed"]), mean=False) if "embed" in maps else width


def _padded(pair: Pair, width: Width, stream: Gather, mean: bool) -> Width:
    """The width with a residual stream of ``stream``'s copies and then padding, means or zeros."""
    table, small, large = pair.table, pair.small["embed"], pair.large["embed"]
    key, change = table.key("embed"), f"--width {width.name}: {table.key('embed')} {small} -> {large}"
    if writer := _norm_on_stream(table):
        raise UnsupportedGrowth(
            f"{change} would pad the residual stream, but in a {table.model_type} a norm writes that stream "
            f"({writer}), and padding does not stay padding there.\n"
            f"Set {key} to a multiple of {small}"
            + ("" if width.name == "lemon" else " with --width lemon")
            + ", or use --width fpi with --lossy, which does not keep the function exactly"
        )
    if not mean and table.norms.kind != "rms":
        raise UnsupportedGrowth(
            f"{change} would pad the residual stream with zeros, and a {table.model_type}'s LayerNorm subtracts a mean "
            f"that zeros change.\nUse --width lemon, which pads with the mean; {width.name} can grow the other axes"
        )
    pads, share = large - len(stream), np.ones(len(stream)) if stream.share is None else stream.share
    silent, share = np.append(stream.index, np.full(pads, -1)), np.append(share, np.zeros(pads))
    normed = Gather(silent, small, share=share)
    means = Gather(np.where(silent < 0, small, silent), small, share=share, mix=np.full((1, small), 1.0 / small))
    kept = len(stream) / large
    factor = scalar(sqrt(kept))
    maps: Mapping[str, Gather | tuple[Gather, ...]] = {
        **width.maps,
        "embed": means if mean else normed,
        "normed": normed,
        "rho": factor,
        "iota": factor,
    }
    reasons = [f"{width.name}: moments of the padding start at zero, though it has a gradient at once"]
    if mean:
        reasons.append("embed is padded with its mean, through which the padding's gradient reaches the copies")
    if not stream.is_even:
        reasons.append("embed is normalised and its copies have uneven shares")
    return replace(
        width,
        maps=maps,
        fresh=width.fresh | Fresh(blank=frozenset({"embed"})),
        norms=Norms(eps=kept, averaged=True),
        reasons=replace(width.reasons, moments=width.reasons.moments or tuple(reasons)),
    )


def _norm_on_stream(table: Table) -> str:
    """A norm's gain that writes the residual stream itself, '' if norms are inside the branches."""
    for row in table.rows:
        atoms = [atom for dim in axes.parse(row.spec) for product in dim for atom in product]
        if any(a.axis == "rho" for a in atoms) and any(a.axis == "embed" and not a.reads for a in atoms):
            return row.name
    return ""
