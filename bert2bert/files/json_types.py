"""Whether a value that was read from JSON has the type that a declaration says."""

from __future__ import annotations

from typing import Any


def mismatch(value: Any, wanted: Any, where: str) -> str | None:
    """What is wrong with a value, in words, if anything.

    wanted: a class, None, a tuple of alternatives, [type of every item], {key: type} ("*": of every entry). A key that
    is absent or unknown is accepted. where: what the value is called.
    """
    if isinstance(wanted, tuple):
        tried = [mismatch(value, one, where) for one in wanted]
        return None if None in tried else tried[0]
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} is {_short(value)}, expected a list"
        return next((bad for item in value if (bad := mismatch(item, wanted[0], f"{where}[]"))), None)
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{where} is {_short(value)}, expected a table"
        pairs = ((f"{where}.{key}", item, wanted.get(key, wanted.get("*"))) for key, item in value.items())
        return next((bad for at, item, kind in pairs if kind is not None and (bad := mismatch(item, kind, at))), None)
    if isinstance(value, bool) and wanted is not bool:
        good = False  # Python counts it among the integers
    else:
        good = value is None if wanted is None else isinstance(value, wanted)
    if good:
        return None
    return f"{where} is {_short(value)}, expected {'nothing' if wanted is None else wanted.__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
