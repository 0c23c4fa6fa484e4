"""The order of a grown model's tensors where its script registers modules in another order than transformers.

Native shards are addressed by position, so a grown checkpoint must have the order of the script's own model. That is
read off the source: a state dict walks the modules in the order in which they were registered, and an added layer has
its modules in the order of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_Rank = dict[str, int]


def script_order(before: Sequence[str], after: Sequence[str]) -> list[str] | None:
    """The target's names in the script's order; None where the source does not have the modules of one of them.

    before: the source's names in the order of its state dict; after: the target's in that of transformers' model, in
    which they stay where the source's are in it, or in no order of modules (as in files without a state dict).
    """
    old, new = set(before), set(after)
    if [name for name in before if name in new] == [name for name in after if name in old]:
        return list(after)
    ranks: list[dict[str, _Rank]] = [{} for _ in _SPELLINGS]
    for name in before:
        parts = name.split(".")
        for end, part in enumerate(parts):
            for spelling, rank in zip(_SPELLINGS, ranks, strict=True):
                below = rank.setdefault(spelling(parts[:end]), {})
                below.setdefault(_sibling(part), len(below))

    def key(name: str) -> list[tuple[int, int]]:
        parts, found = name.split("."), []
        for end, part in enumerate(parts):
            known = (rank.get(spelling(parts[:end]), {}) for spelling, rank in zip(_SPELLINGS, ranks, strict=True))
            place = next(below[_sibling(part)] for below in known if _sibling(part) in below)
            found.append((place, int(part) if part.isdigit() else 0))
        return found

    try:
        return sorted(after, key=key) if sorted(before, key=key) == list(before) else list(after)
    except StopIteration:
        return None


def _sibling(part: str) -> str:
    return "#" if part.isdigit() else part


def _as_it_is(parts: Sequence[str]) -> str:
    return ".".join(parts)


def _of_any_layer(parts: Sequence[str]) -> str:
    """Without the first number, which is a layer's."""
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join("#" if i == first else part for i, part in enumerate(parts))


def _of_any_number(parts: Sequence[str]) -> str:
    return ".".join(map(_sibling, parts))


_SPELLINGS: tuple[Callable[[Sequence[str]], str], ...] = (_as_it_is, _of_any_layer, _of_any_number)
"""Of a module's path, from the nearest to the most general."""
