"""Checks of single values of a recipe: each raises InvalidConfig with the value's dotted name. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bert2bert.errors import InvalidConfig, did_you_mean


def require(holds: bool, what: str, found: Any, expected: str) -> None:
    """``what``: the dotted name; ``expected``: in words."""
    if not holds:
        raise InvalidConfig(f"{what} is {found!r}; expected {expected}")


def in_range(what: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """A finite number of at least ``low`` (above it, if open_low) and at most ``high``."""
    enough = value > low if open_low else value >= low
    expected = f"a number {'above' if open_low else 'of at least'} {low:g}"
    expected += f" and at most {high:g}" if high != math.inf else ""
    require(enough and value <= high and math.isfinite(value), what, value, expected)


def one_of(what: str, value: str, known: Iterable[str]) -> None:
    """One of the ``known`` words."""
    if value not in (words := tuple(known)):
        raise InvalidConfig(f"{what} is {value!r}: {did_you_mean(value, words)}")
