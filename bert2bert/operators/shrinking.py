"""Up and down between levels: coalesce, decoalesce, share, and shrink, the way back of any growth that copies.

A shrinking operator names the growth from the target to the source whose inverse it is; `growth.inverse` plans it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from bert2bert.operators.decisions import Layer, Pair, Width
from bert2bert.operators.depth import STEPS, Scale, steps
from bert2bert.operators.registry import operator
from bert2bert.operators.width_bert2bert import fpi

Order = Literal["interleave", "stack"]
_PAPER = "Zou et al., Multi-Level Framework, ICLR 2024"
_ODE = "Lauga et al., 2025"
_SWE = "Yang et al., Sharing Weights and Then Unsharing, 2021"


@operator(
    "width", "decoalesce", paper=_PAPER, copies=True,
    keeps="the function, where the new width is a multiple of the old one",
)  # fmt: skip
def decoalesce(pair: Pair) -> Width:
    """Tiled copies, x' = [x, x, …]: outputs are copied, inputs divided by the number of copies.

    The paper halves the word embeddings for a tied head; here the norm before the head is halved, which is exact in
    GPT-2 too.
    """
    return replace(fpi(pair, choice="left"), name="decoalesce")


@operator("depth", "decoalesce", paper=f"{_PAPER}; {_ODE}", keeps=STEPS, moments="carried")
def decoalesce_layers(
    pair: Pair, source: int, target: int, *, order: Order = "interleave", scale: Scale = "none"
) -> Sequence[int | Layer]:
    """Copies of layers. order: 'interleave', side by side (0 0 1 1), as the paper has it; 'stack' (0 1 0 1), as its
    released settings do.

    scale: 'step' divides what each of c copies adds to the residual stream by c (Lauga et al.).
    """
    if order == "stack":
        return steps([i % source for i in range(target)], scale)
    return steps([i * source // target for i in range(target)], scale)


@operator("width", "coalesce", paper=_PAPER, keeps="what copies share", moments="carried", shrinks=True)
def coalesce() -> str:
    """The way back of decoalesce: features i, i + n, … become one, averaged where written and summed where read.

    After training at the smaller size, decoalesce, and interpolate with the checkpoint from before: a V-cycle.
    """
    return "decoalesce"


@operator("depth", "coalesce", paper=f"{_PAPER}; {_ODE}", keeps="what copies share", moments="carried", shrinks=True)
def coalesce_layers(
    *, order: Order = "interleave", scale: Scale = "none", restriction: Literal["average", "injection"] = "average"
) -> str:
    """Layers become the mean of their group. order: 'interleave', of neighbours; 'stack', of layers i, i + n, …

    scale: 'step' multiplies what the one layer for c adds to the residual stream by c, so that it steps as far as they
    did together (Lauga et al.). restriction: 'injection' keeps the first layer of each group in place of the mean, as
    Lauga et al. do.
    """
    return f"decoalesce:order={order},scale={scale}"


@operator("depth", "share", paper=_SWE, keeps="what shared layers have in common", moments="carried", shrinks=True)
def share(*, gradient: Literal["mean", "sum"] = "mean") -> str:
    """The way back of unshare: A layers, each the mean of the layers i, i + A, i + 2A, …

    gradient, what the shared weights will be trained with: 'mean' of the runs' gradients, moments are averaged; 'sum',
    they are added.
    """
    return f"unshare:gradient={gradient}"


@operator("width", "shrink", paper="the inverse of any growth that copies", keeps="what copies share",
          moments="carried", shrinks=True)  # fmt: skip
def shrink(*, of: str = "fpi") -> str:
    """The way back of another width operator, L in place of E: a feature is the mean of its copies where written and
    their sum where read; features that are not copies are dropped.

    of: the operator, with its options and the seed of the growth. shrink(grow(x)) = x.
    """
    return of


@operator("depth", "shrink", paper="the inverse of any growth that copies", keeps="what copies share",
          moments="carried", shrinks=True)  # fmt: skip
def shrink_layers(*, of: str = "stack") -> str:
    """The way back of another depth operator: a layer is the mean of its copies; inserted layers are dropped.

    of: the operator, with its options.
    """
    return of
