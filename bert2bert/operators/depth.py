"""Depth operators: for each target layer, the source layer that it copies."""

from __future__ import annotations


def stack(source: int, target: int) -> list[int]:
    """Stack whole copies of the model, then its top layers once more for what remains.

    bert2BERT (Chen et al., ACL 2022), algorithm 1: 5 -> 12 gives 0-4, 0-4, 3, 4. StackBERT's doubling is the case
    without remainder.
    """
    times, rest = divmod(target, source)
    return list(range(source)) * times + list(range(source - rest, source))


DEPTHS = {"stack": stack}
