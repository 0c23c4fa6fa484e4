"""Keys of a recipe that were called otherwise in older versions: refused in a file, taken on the command line and in
what an older run recorded. Imports no torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "batch_rows": "global_batch_size",
    "clip": "gradient_clipping",
    "data.mask_share": "objective.mlm_probability",
    "data.mlm_probability": "objective.mlm_probability",
}
"""Dotted name before -> now."""


def current(override: str) -> str:
    """An override ``key=value`` with its key as it is called now."""
    key, equals, value = override.partition("=")
    return RENAMED.get(key, key) + equals + value


def renamed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as an older run recorded it, with its keys as they are called now."""
    found = copy.deepcopy(dict(plain))
    for before, now in RENAMED.items():
        holder, key = _place(found, before)
        if key in holder:
            value = holder.pop(key)
            holder, key = _place(found, now)
            holder[key] = value
    return found


def _place(plain: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The dict in which a dotted name stands, and its key there."""
    *above, key = name.split(".")
    if not above:
        return plain, key
    new = {"kind": "masked"} if above == ["objective"] else {}  # older runs predicted masked tokens
    return plain.setdefault(above[0], new), key


def explain(error: Exception) -> str | None:
    """What a TypeError of a recipe's file says of an old key: its new name; None if it is of something else."""
    key = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    for before, now in RENAMED.items():
        *moved, old = before.split(".")
        if key and old == key[1]:
            remedy = f"write objective=Masked({now.split('.')[-1]}=…) in Recipe(…)" if moved else "rename it"
            return f"{before} is called {now} now; {remedy}"
    return None
