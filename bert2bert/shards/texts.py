"""Small text files that describe a checkpoint.

Refuses (InvalidCheckpoint) what is not the JSON object that is expected, and says what the file is instead.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidCheckpoint
from bert2bert.shards.sniff import describe, sniff


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InvalidCheckpoint if it is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: not readable as JSON{not_text(path, error)}") from None
    if not isinstance(found, dict):
        raise InvalidCheckpoint(f"{path}: holds a JSON {type(found).__name__}, expected an object")
    return found


def not_text(path: Path, error: Exception) -> str:
    """Why a text file cannot be used, to follow the words that say so: what the file is instead, or the error."""
    with contextlib.suppress(OSError):
        if sniff(path).kind != "text":
            return f": it is {describe(path)}"
    return f" ({error})"
