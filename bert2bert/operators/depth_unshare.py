"""Unsharing: from a model that runs the same layers several times to one whose layers are its own.

Refuses (`UnsupportedGrowth`) layer counts that no whole number of runs gives, and models whose first layer lacks
tensors that the others have, so that the same layer cannot be at both places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.decisions import Layer, Pair
from bert2bert.operators.depth import refuse
from bert2bert.operators.registry import operator


@operator(
    "depth", "unshare", paper="Yang et al., Sharing Weights, Then Unsharing, 2021",
    keeps="the function of the model with shared layers", needs="a source whose layers are run a whole number of times",
    moments="carried",
)  # fmt: skip
def unshare(
    pair: Pair, source: int, target: int, *, gradient: Literal["mean", "sum"] = "mean"
) -> Sequence[int | Layer]:
    """Units A x B: the source's A layers, run B times with shared weights, become A · B layers of their own; target
    layer l is source layer l mod A.

    gradient, what the shared weights were trained with: 'mean' of the runs' gradients (the paper's), whose moments are
    copied; 'sum', as automatic differentiation gives, whose moments are m / B and v / B².
    """
    times, rest = divmod(target, source)
    if rest:
        refuse(pair, "unshare", source, target, f"units run whole times: {target - rest} or {target - rest + source}")
    lacking = [name for axis in pair.table.sizes.depth for name in pair.table.later(axis)]
    if times > 1 and lacking:
        raise UnsupportedGrowth(
            f"--depth unshare: layer 0 of a {pair.table.model_type} has not all that the layers above it have "
            f"({lacking[0]}), so they cannot be the same layer; use --depth gstack, which copies it all the same"
        )
    moment = 1.0 / times if gradient == "sum" else 1.0
    return [Layer(layer % source, moment=moment, runs=times) for layer in range(target)]
