"""What types a manifest's entries have, so that whoever reads one need not ask again.

Refuses, as InvalidCheckpoint, a manifest with an entry of another type, which is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidCheckpoint

_NUMBER = (int, float)
_SHAPES: dict[str, Any] = {
    "kind": str, "form": str, "tag": (str, None), "stage": (int, None), "world_size": (int, None),
    "expert_parallel": int,
    "precision": (str, None), "group_layout": (str, None), "model": ({}, None), "aliases": {"*": str},
    "groups": [{"part": str, "decay": bool, "names": [str], "hyper": {}, "step": int}],
    "tensors": {"*": {"shape": [int], "digest": {"*": str}}},
    "files": {"*": int}, "digests": ({"kind": str, "files": {"*": str}}, None),
    "counters": {"*": (int, None)}, "versions": ({}, None),
    "growth": ({
        "operators": {}, "plan_digest": str, "source": {}, "with": {}, "source_config": {},
        "source_spent": ({"*": _NUMBER}, None), "tokenizer_digest": (str, None), "prefix": str,
        "exactness": {"*": [str]}, "warnings": [str], "drift": ({}, None), "versions": {},
    }, None),
    "training": ({
        "recipe": {}, "phase": int, "phase_step": int, "step": int, "spent": {"*": _NUMBER}, "data": {"rows": int},
    }, None),
    "reshard": ({"source": {}, "plan_digest": str, "notes": [str], "versions": {}}, None),
}  # fmt: skip
"""Key -> type: a class, None, a tuple of alternatives, [type of every item], {key: type} ("*": of every entry). A key
that is not there, or not known, is let through."""
_NEEDED = {"groups": ("names",), "tensors": ("shape",)}


def check(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InvalidCheckpoint for the first entry that has another type than this program writes."""
    for key, wanted in _SHAPES.items():
        if key in manifest and (bad := _bad(manifest[key], wanted, key)):
            raise InvalidCheckpoint(f"{path} is not a manifest of this project: {bad}. Restore the file.")
    for key, needed in _NEEDED.items():
        found = manifest.get(key) or ()
        for entry in found.values() if isinstance(found, dict) else found:
            if lack := [name for name in needed if name not in entry]:
                raise InvalidCheckpoint(f"{path} is not a manifest of this project: no {lack[0]!r} in {key}.")
    for name, entry in manifest.get("tensors", {}).items():
        if any(size < 0 for size in entry["shape"]):
            raise InvalidCheckpoint(f"{path} is not a manifest of this project: {name!r} has shape {entry['shape']}.")


def _bad(value: Any, wanted: Any, where: str) -> str | None:
    """What is wrong, in words, if anything."""
    if isinstance(wanted, tuple):
        tried = [_bad(value, one, where) for one in wanted]
        return None if None in tried else tried[0]
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} is {_short(value)}, expected a list"
        return next((bad for item in value if (bad := _bad(item, wanted[0], f"{where}[]"))), None)
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{where} is {_short(value)}, expected a table"
        pairs = ((f"{where}.{key}", item, wanted.get(key, wanted.get("*"))) for key, item in value.items())
        return next((bad for at, item, kind in pairs if kind is not None and (bad := _bad(item, kind, at))), None)
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
