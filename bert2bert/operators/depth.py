"""Depth operators: for each target layer, the source layer that it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from bert2bert.operators.pair import Layer, Pair
from bert2bert.operators.registry import operator


@operator(
    "depth", "stack", paper="Chen et al., bert2BERT, ACL 2022, algorithm 1", keeps="nothing exactly", moments="carried"
)
def stack(pair: Pair, source: int, target: int) -> Sequence[int | Layer]:
    """Stack whole copies of the model, then its top layers once more for what remains: 5 -> 12 is 0-4, 0-4, 3, 4.

    StackBERT's doubling (Gong et al., ICML 2019) is the case without remainder.
    """
    times, rest = divmod(target, source)
    return [*range(source)] * times + [*range(source - rest, source)]
