"""Small text files that describe a checkpoint.

Refuses (InvalidCheckpoint) what is not the JSON object that is expected, and says what the file is instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.sniff import instead


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InvalidCheckpoint if it is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: not readable as JSON{instead(path, 'text') or f' ({error})'}") from None
    if not isinstance(found, dict):
        raise InvalidCheckpoint(f"{path}: holds a JSON {type(found).__name__}, expected an object")
    return found
