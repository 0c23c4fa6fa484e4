"""The little languages of a table, one grammar and one reader each; specs have theirs in `algebra.axes`.

    size    := product { "|" product }           the first alternative of which the config has every key
    product := term { ("*" | "/") term }         a quotient must be whole
    term    := config key | axis named before | whole number
    needs   := { either }                        heads: every one of these, separated by spaces
    either  := ["!"] head { "|" ["!"] head }     one of these; ! = the model lacks it
    when    := "" | ["!"] key [ "=" glob ]       the config's value matches, or without a glob is true; "" always holds
    std     := { "range" | axis | whole number } one over the root of the product, times the config's initializer_range
                                                 (with range) or initializer_factor
    default := "=" key | any other value         =KEY: another key's value
    name    := text with "{weight,bias}" and one "{" depth axis "}", or without

Refuses configs that lack a size, or whose sizes do not divide where they must (`InvalidConfig`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from bert2bert.errors import InvalidConfig

_BOTH = "{weight,bias}"


class Term(NamedTuple):
    """One factor of a size: '*' or '/' ('' before the first), and what is multiplied or divided by."""

    sign: str
    name: str


@lru_cache(maxsize=512)
def products(size: str) -> tuple[tuple[Term, ...], ...]:
    """The alternatives of a *size*, each with its terms."""
    return tuple(
        tuple(Term(sign, name) for sign, name in re.findall(r"([/*]?)([\w.]+)", product)) for product in size.split("|")
    )


def evaluate(
    size: str, config: Mapping[str, Any], sizes: Mapping[str, int], key: Callable[[str], str], least: int = 1
) -> int:
    """A *size* under a config. sizes: of the axes named before; key: the config key to name for an axis; least: that a
    number of the config must be.

    Raises InvalidConfig.
    """
    expected = "a positive integer" if least else "an integer of at least 0"
    for product in products(size):
        total: int | None = None
        for sign, name in product:
            value = int(name) if name.isdigit() else sizes.get(name) if name in sizes else config.get(name)
            value = (len(value) or None) if isinstance(value, Mapping) else value  # labels by their numbers
            if value is None:
                total = None
                break
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidConfig(f"model config: {name} is {value!r}; {expected} is expected")
            if sign == "/" and total is not None and total % value:
                raise InvalidConfig(
                    f"model config: {key(name) if name in sizes else name}={value} does not divide "
                    f"{product[0].name}={total}; choose sizes that do"
                )
            total = value if total is None else total // value if sign == "/" else total * value
        if total is not None:
            return total
    first = products(size)[0][0].name
    found = f"is {config[first]!r}" if first in config else "is missing"
    raise InvalidConfig(f"model config: {first} {found}; {expected} is expected")


def present(needs: str, heads: frozenset[str]) -> bool:
    """Whether a model with these heads has what a *needs* asks for."""
    return all(
        any((head.removeprefix("!") in heads) != head.startswith("!") for head in either) for either in _eithers(needs)
    )


def asks(needs: str, head: str) -> bool:
    """Whether a *needs* asks for this head alone, whatever else it asks for."""
    return [head] in _eithers(needs)


def _eithers(needs: str) -> list[list[str]]:
    return [either.split("|") for either in needs.split()]


def holds(when: str, config: Mapping[str, Any]) -> bool:
    """Whether a condition, a *when*, holds for a config."""
    if not when:
        return True
    key, equals, glob = when.removeprefix("!").partition("=")
    value = config.get(key)
    found = fnmatchcase(str(value), glob) if equals else bool(value)
    return found != when.startswith("!")


def deviation(std: str, sizes: Mapping[str, int], spread: float, factor: Any) -> float:
    """The standard deviation that a *std* gives. spread, factor: the config's initializer_range, initializer_factor."""
    terms = std.split()
    divisor = math.prod(int(term) if term.isdigit() else sizes[term] for term in terms if term != "range")
    return (spread if "range" in terms else float(factor)) / math.sqrt(divisor)


def referred(default: object) -> str:
    """The key whose value a *default* is, '' for a value of its own."""
    return default[1:] if isinstance(default, str) and default.startswith("=") else ""


def depth_axis(name: str) -> str:
    """The depth axis of a *name*, '' outside the layers."""
    found = re.search(r"\{(\w+)\}", name)
    return found[1] if found else ""


def numbered(name: str, layer: int | None) -> str:
    """A *name* in one layer; as it is outside the layers."""
    return name if layer is None else name.replace("{" + depth_axis(name) + "}", str(layer))


def weight_and_bias(name: str) -> dict[str, str]:
    """The tensors of a *name*: 'weight' and 'bias' -> the name with it, or '' -> the name, if there is one alone."""
    return {kind: name.replace(_BOTH, kind) for kind in ("weight", "bias")} if _BOTH in name else {"": name}
