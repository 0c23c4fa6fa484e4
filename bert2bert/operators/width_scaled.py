"""Width operators that keep no function by design, with values as published: centre, sparkling, msg.

Refuses nothing of its own; another head size, which none of them has, is refused by the plan.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Literal

import numpy as np

from bert2bert.algebra.maps import Gather, corner, identity
from bert2bert.operators.decisions import Fresh, Norms, Pair, Reasons, Width
from bert2bert.operators.registry import operator
from bert2bert.operators.width_bert2bert import Choice, fpi


@operator(
    "width", "centre", paper="Warner et al., ModernBERT, 2024, A.2", keeps="nothing exactly", moments="carried"
)  # fmt: skip
def centre(pair: Pair) -> Width:
    """The source in the centre of every axis, wrapped around to the edges: U[i, j] = W[(i - o) mod d_in, (j - p) mod
    d_out], o and p half of what an axis grows by, rounded down; no weight is divided by the number of copies.

    Query, key and value, and the halves of gated feed-forwards, are each tiled on their own. Heads stay whole (the
    paper's matrices agree with that where the heads grow by an even number). ModernBERT-large was made so from base,
    with --depth gopher.
    """

    def tiled(source: int, target: int) -> Gather:
        return Gather((np.arange(target) - (target - source) // 2) % source, source)

    maps = {axis: tiled(pair.small[axis], pair.large[axis]) for axis in pair.grown}
    unscaled = {axis: identity(1) for axis in pair.table.sizes.scales}  # values are copied as they are, gains included
    reasons = Reasons(
        function=(f"centre: readers of copies on {', '.join(maps)} are not divided by their number",),
        moments=("moments are copied with the values",),
    )
    return Width("centre", {**maps, **unscaled}, norms=Norms(averaged=True), reasons=reasons if maps else Reasons())


@operator(
    "width", "sparkling", paper="Yu et al., SPARKLING, ICML 2026", moments="asymmetric",
    keeps="the root mean square of activations; the function only where copies are even",
)  # fmt: skip
def sparkling(pair: Pair, *, fresh: Literal["copies", "random"] = "copies", choice: Choice = "balanced") -> Width:
    """Copies, or fresh entries, with weights that read them scaled so that activations keep their root mean square.

    fresh=copies: features and their readers are both copied, scale 1/√(mean of squared counts), which is the paper's
    1/√(1 + 3c) for c = d'/d - 1 ≤ 1 and 1/(1 + c) for whole c, where the function is kept too. fresh=random: drawn,
    scale √(d/d'). choice: as fpi's. Moments of old entries are kept unscaled, those of fresh ones are zero, which
    breaks the symmetry of copies.
    """
    maps: dict[str, Gather | tuple[Gather, ...]] = dict(fpi(pair, choice=choice).maps)
    std = {a: sqrt(pair.large[of] / pair.small[of]) for a, of in pair.table.sizes.scales.items() if fresh == "random"}
    for axis in pair.grown:
        if fresh == "random":
            scale = sqrt(pair.small[axis] / pair.large[axis])
            maps[axis] = replace(corner(pair.small[axis], pair.large[axis]), share=np.full(pair.large[axis], scale))
            std |= {f"~{a}": scale for a in (axis, *(f for f, of in pair.table.sizes.follows.items() if of == axis))}
        else:
            found = maps[axis]
            maps[axis] = _even(found) if isinstance(found, Gather) else tuple(map(_even, found))
    made = {axis: [m] if isinstance(m, Gather) else m for axis, m in maps.items()}
    changed = ", ".join(axis for axis, found in made.items() if not all(m.is_uniform for m in found))
    reasons = Reasons(
        function=(f"sparkling keeps the size of activations on {changed}, not the function",) if changed else (),
        moments=("moments of old entries are kept as they were, those of fresh entries start at zero",),
        notes=(
            "SPARKLING warms the learning rate of fresh entries alone up again, to 1.3 times the current one within "
            "250 steps, and then follows the schedule: an optimizer with one rate a tensor can only warm all up",
        ),
    )
    return Width(
        "sparkling",
        maps,
        fresh=Fresh(std=std),
        norms=Norms(averaged=True),
        reasons=reasons if maps else Reasons(),
        keeps_moments=True,
    )


@operator("width", "msg", paper="Yao et al., MSG, ICLR 2024", keeps="nothing exactly", moments="asymmetric")
def msg(pair: Pair) -> Width:
    """The target layout of masked structural growth: the source in a corner, fresh weights drawn from N(0, 0.02²), norm
    gains 1, biases 0; moments of the corner kept, of the rest zero, the step count kept.

    The masks that hide what is fresh, annealed from 0 to 1 over some 5000 steps of training, are not in the plan: they
    act inside the model, while it runs. Without them the function changes.
    """
    maps = {axis: corner(pair.small[axis], pair.large[axis]) for axis in pair.grown}
    exact = "lemon, or gesmundo in RMSNorm models" if pair.table.norms.pre else "fpi at whole multiples of the width"
    reason = (
        f"msg: fresh entries on {', '.join(maps)} are drawn at random and act at once, for the masks that hide them "
        f"act while the model runs and no checkpoint holds them; exact without masks: --width {exact}"
    )
    moments = "moments of old entries are kept, those of fresh entries start at zero"
    reasons = Reasons(function=(reason,), moments=(moments,)) if maps else Reasons()
    return Width("msg", maps, fresh=Fresh(std={"": 0.02}), norms=Norms(averaged=True), reasons=reasons)


def _even(gather: Gather) -> Gather:
    """The copies with one share for all, by which a sum over random features and weights keeps its variance."""
    return replace(gather, share=np.full(len(gather), 1.0 / sqrt(np.square(gather.counts).mean())))
