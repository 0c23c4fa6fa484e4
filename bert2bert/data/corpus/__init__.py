"""The embedded corpus: seven public-domain novels (README.md beside this file names them and their origin)."""

from __future__ import annotations

from pathlib import Path

_SUFFIX = ".txt.xz"


def books() -> dict[str, Path]:
    """Every embedded book, name -> xz-compressed UTF-8 text file, in alphabetical order."""
    return {path.name[: -len(_SUFFIX)]: path for path in sorted(Path(__file__).parent.glob("*" + _SUFFIX))}
