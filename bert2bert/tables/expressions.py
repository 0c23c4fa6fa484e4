"""The little languages of a table: sizes over config keys, heads that a row needs, conditions on a config.

Refuses configs that lack a size, or whose sizes do not divide where they must (`InvalidConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from bert2bert.errors import InvalidConfig


def evaluate(expression: str, config: Mapping[str, Any], sizes: Mapping[str, int], key: Callable[[str], str]) -> int:
    """The size of an axis: products and quotients of config keys, known axes and whole numbers, in alternatives.
    key: the config key to name for an axis. Raises InvalidConfig."""
    first = ""
    for alternative in expression.split("|"):
        total: int | None = None
        for sign, name in re.findall(r"([/*]?)([\w.]+)", alternative):
            first = first or name
            value = int(name) if name.isdigit() else sizes.get(name) if name in sizes else config.get(name)
            value = (len(value) or None) if isinstance(value, Mapping) else value  # labels by their numbers
            if value is None:
                total = None
                break
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidConfig(f"model config: {name} is {value!r}; a positive integer is expected")
            if sign == "/" and total is not None and total % value:
                raise InvalidConfig(
                    f"model config: {key(name) if name in sizes else name}={value} does not divide "
                    f"{alternative.split('/')[0]}={total}; "
                    f"choose sizes that do"
                )
            total = value if total is None else total // value if sign == "/" else total * value
        if total is not None:
            return total
    found = f"is {config[first]!r}" if first in config else "is missing"
    raise InvalidConfig(f"model config: {first} {found}; a positive integer is expected")


def present(needs: str, heads: frozenset[str]) -> bool:
    """Whether a model with these heads has what a row needs: every head named ('a|b': one of them), none of those
    after a '!'."""
    return all(
        any((head.removeprefix("!") in heads) != head.startswith("!") for head in need.split("|"))
        for need in needs.split()
    )


def holds(when: str, config: Mapping[str, Any]) -> bool:
    """Whether a condition on the config holds: 'key', '!key', 'key=glob', '!key=glob'; '' always does."""
    if not when:
        return True
    key, equals, glob = when.removeprefix("!").partition("=")
    value = config.get(key)
    found = fnmatchcase(str(value), glob) if equals else bool(value)
    return found != when.startswith("!")
