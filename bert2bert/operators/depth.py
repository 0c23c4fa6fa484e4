"""Depth operators: for each target layer, the source layer that it comes from.

A copied layer keeps its moments, a heuristic; inserted identities and layers drawn at random start with zero moments.
Refuses (`UnsupportedGrowth`) layer counts that an operator cannot make, and says which it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Literal, NoReturn

from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import Layer, Pair
from bert2bert.operators.registry import operator

_CHANGES = "nothing exactly"
STEPS = "nothing exactly; with scale=step, in a pre-norm model, the function to first order in the residual branches"
Scale = Literal["none", "step"]


def refuse(pair: Pair, text: str, source: int, target: int, works: str) -> NoReturn:
    """Say which layer counts an operator makes. Raises UnsupportedGrowth."""
    keys = [pair.table.key(a) for a in pair.table.sizes.depth if (pair.small[a], pair.large[a]) == (source, target)]
    raise UnsupportedGrowth(
        f"--depth {text}: the target config says {keys[0] if keys else 'layers'}={target}, and the source has "
        f"{source}; it makes {works}. Choose such a number, or --depth stack, interpolate or insert_identity, which "
        f"make any"
    )


def unchanged(pair: Pair, source: int, target: int) -> bool:
    """Whether this is the one of several stacks (T5's two) that keeps its layers while another grows."""
    return source == target and any(pair.small[axis] != pair.large[axis] for axis in pair.table.sizes.depth)


def steps(rows: Sequence[int], scale: Scale) -> Sequence[int | Layer]:
    """Copied layers as they are, or as smaller steps of the same way: with layers read as Euler's steps of a
    differential equation, x + h f(x), each of c copies steps by h / c.

    What writes the residual stream is divided by c. A copy then has the source's gradient there, and 1/c of it
    elsewhere.
    """
    if scale == "none":
        return rows
    shares = {layer: 1.0 / rows.count(layer) for layer in rows}
    return [Layer(layer, moment=shares[layer], step=shares[layer]) for layer in rows]


@operator(
    "depth", "stack", paper="Chen et al., bert2BERT, ACL 2022, algorithm 1", keeps=_CHANGES, moments="carried"
)  # fmt: skip
def stack(pair: Pair, source: int, target: int) -> Sequence[int | Layer]:
    """Stack whole copies of the model, then its top layers once more for what remains: 5 -> 12 is 0-4, 0-4, 3, 4.

    StackBERT's doubling (Gong et al., ICML 2019) is the case without remainder.
    """
    times, rest = divmod(target, source)
    return [*range(source)] * times + [*range(source - rest, source)]


@operator(
    "depth", "gstack", paper="Du et al., Stacking Your Transformers, NeurIPS 2024", keeps=_CHANGES,
    needs="a multiple of the source's layers", moments="carried",
)  # fmt: skip
def gstack(pair: Pair, source: int, target: int, *, g: int = 0) -> Sequence[int | Layer]:
    """g whole copies on top of each other: target layer l is source layer l mod L.

    g: default, as many as the target config asks for; the paper finds 2 to 4 best and recommends 4.
    """
    if target % source or (g and g * source != target and not unchanged(pair, source, target)):
        below = target // source * source
        works = f"{g * source} layers" if g else f"whole copies: {below} or {below + source} layers"
        refuse(pair, f"gstack:g={g}" if g else "gstack", source, target, works)
    return [*range(source)] * (target // source)


@operator(
    "depth", "interleave", paper="Shen et al., Staged Training, ICML 2022, and others", keeps=STEPS,
    needs="a multiple of the source's layers", moments="carried",
)  # fmt: skip
def interleave(pair: Pair, source: int, target: int, *, scale: Scale = "none") -> Sequence[int | Layer]:
    """Copies of a layer beside each other: 0, 0, 1, 1, …

    scale: 'step' divides what each of c copies adds to the residual stream by c (Lauga et al., 2025).
    """
    if target % source:
        below = target // source * source
        refuse(pair, "interleave", source, target, f"whole copies: {below} or {below + source} layers")
    return steps([layer for layer in range(source) for _ in range(target // source)], scale)


@operator(
    "depth", "interpolate", paper="Pan et al., Apollo, AAAI 2024; AquilaMoE, 2024", keeps=STEPS, moments="carried"
)
def interpolate(pair: Pair, source: int, target: int, *, scale: Scale = "none") -> Sequence[int | Layer]:
    """Target layer l is source layer ⌊l · L_source / L_target⌋, for any number of layers: 3 -> 5 is 0, 0, 1, 1, 2.

    scale: 'step' divides what each of c copies adds to the residual stream by c (Lauga et al., 2025).
    """
    return steps([layer * source // target for layer in range(target)], scale)


@operator("depth", "gopher", paper="Warner et al., ModernBERT, 2024, A.2; Gopher", keeps=_CHANGES, moments="carried")
def gopher(pair: Pair, source: int, target: int) -> Sequence[int | Layer]:
    """Target layer l is source layer round(l · L_source / L_target), halves to even, at most the last.

    ModernBERT-large's own: 22 -> 28 with --width centre.
    """
    return [min(round(layer * source / target), source - 1) for layer in range(target)]


@operator(
    "depth", "upscale", paper="Kim et al., SOLAR 10.7B, NAACL 2024", keeps=_CHANGES,
    needs="an even number of layers, at most twice the source's", moments="carried",
)  # fmt: skip
def upscale(pair: Pair, source: int, target: int, *, m: int = 0) -> Sequence[int | Layer]:
    """A copy without its last m layers below a copy without its first m: 0 … L-m-1, m … L-1; 2 (L - m) layers.

    m: default, as the target config asks, L - target / 2; SOLAR's 32 -> 48 is m=8.
    """
    if target == source and (not m or unchanged(pair, source, target)):
        return list(range(source))
    made = 2 * (source - (m or source - target // 2))
    if made != target or target > 2 * source:
        even = f"an even number of layers from {source + source % 2} to {2 * source}"
        works = f"{made} layers" if source <= made and m else even
        refuse(pair, f"upscale:m={m}" if m else "upscale", source, target, works)
    return [*range(target // 2), *range(source - target // 2, source)]


@operator(
    "depth", "top", paper="Yang et al., MSLT, 2020", keeps=_CHANGES, needs="at most twice the source's layers",
    moments="carried",
)  # fmt: skip
def top(pair: Pair, source: int, target: int) -> Sequence[int | Layer]:
    """New layers on top are copies of as many top ones: 4 -> 6 is 0-3, 2, 3.

    MSLT trains them alone at first, the old ones frozen, and all together at the end; it grows in stages of at most
    doubling.
    """
    if target > 2 * source:
        refuse(pair, "top", source, target, f"at most {2 * source} layers in one growth")
    return [*range(source), *range(2 * source - target, source)]


@operator(
    "depth", "middle", paper="Saunshi et al., MIDAS, NeurIPS 2024; Kapl et al., LIDAS, 2025", keeps=_CHANGES,
    needs="whole blocks to be added", moments="carried",
)  # fmt: skip
def middle(
    pair: Pair, source: int, target: int, *, block: int = 0, centre: Literal["block", "layer"] = "block"
) -> Sequence[int | Layer]:
    """The middle block of layers duplicated, again and again: 6 -> 8 in blocks of 2 is 0, 1, 2, 3, 2, 3, 4, 5.

    block: layers in a block; default, the largest that divides what there is and what is added. centre, what is in the
    middle: 'block' ⌈n/2⌉ of the n blocks counted from the bottom (MIDAS); 'layer', as many layers around the middle
    one, wherever blocks begin (LIDAS). MIDAS adds one block a stage, stage i of a length in proportion to i.
    """
    added, rows = target - source, list(range(source))
    whole = gcd(source, added) if centre == "block" else added
    fits = [size for size in range(1, source + 1) if whole % size == 0]
    size = block or gcd(source, added) or 1
    if added and size not in fits:
        works = f"whole blocks: for this number of layers, block={' | '.join(map(str, fits))}"
        refuse(pair, f"middle:block={size}" + ",centre=layer" * (centre == "layer"), source, target, works)
    while len(rows) < target:
        start = (len(rows) // size - 1) // 2 * size if centre == "block" else (len(rows) - size) // 2
        rows[start + size : start + size] = rows[start : start + size]
    return rows


@operator(
    "depth", "insert_identity", paper="Wu et al., LLaMA Pro, ACL 2024; Wang et al., LEMON, ICLR 2024",
    keeps="the function, bit for bit, where norms are inside the residual branches",
    needs="a pre-norm model, to be exact", moments="asymmetric",
)  # fmt: skip
def insert_identity(
    pair: Pair, source: int, target: int, *, place: Literal["even", "top"] = "even"
) -> Sequence[int | Layer]:
    """Copies of layers, each right above its original, whose weights and biases that write the residual stream are 0.

    place, which layers are followed by one (all, and some once more, beyond doubling): 'even', evenly spaced
    (LLaMA Pro: 32 -> 40 after every fourth); 'top', the upper ones (LEMON). Only those zeroed weights get a gradient at
    first. LLaMA Pro trains the new layers alone; their moments start at zero.
    """
    fresh, rows = target - source, list[int | Layer]()
    for layer in range(source):
        if place == "even":
            many = (layer + 1) * fresh // source - layer * fresh // source
        else:
            many = fresh // source + (layer >= source - fresh % source)
        rows += [layer, *[Layer(layer, identity=True)] * many]
    return rows


@operator(
    "depth", "random", paper="training from scratch; Bu, Zero/One-Layer Expansion, ICML 2026",
    keeps="nothing exactly; with residual=zero the function, bit for bit, where norms stand inside the branches",
    needs="any model, also one without layers", moments="asymmetric",
)  # fmt: skip
def random(
    pair: Pair, source: int, target: int, *, residual: Literal["drawn", "zero"] = "drawn"
) -> Sequence[int | Layer]:
    """Keep the source's layers and put layers drawn at random, as for training from scratch, on top.

    residual, what those first write to the residual stream: 'drawn', as from scratch; 'zero', nothing, for the weights
    and biases that write it are 0, and get a gradient alone at first. The only operator for a source without layers.
    """
    return [*range(source), *[Layer(None, identity=residual == "zero")] * (target - source)]
