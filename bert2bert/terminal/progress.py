"""How far long work has come: a bar on a terminal; anywhere else whole lines, at most one in `SECONDS`, and none for
work that is done sooner. Always on standard error.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

SECONDS = 30.0


class _Lines:
    """A text stream for tqdm that cannot move a cursor: what tqdm would draw over is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> None:
        if shown := text.strip("\r\n "):
            self.stream.write(shown + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(total: float | None, what: str, unit: str = "B", show: bool = True) -> Any:
    """A tqdm of ``total`` units (None: not known), with ``update(n)``; a context manager. show: or print nothing."""
    from tqdm import tqdm

    if not show or sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not show)
    form = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_fmt}, {remaining} left" if total else None
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, mininterval=SECONDS, miniters=1, delay=SECONDS,
        file=_Lines(sys.stderr), bar_format=form or "{desc}: {n_fmt}{unit}, {rate_fmt}",
    )  # fmt: skip
