"""Ranks whose launcher is gone stop by themselves, as on its signal: with a checkpoint.

`deepspeed` starts a process that starts the ranks. A signal that ends the first of them reaches neither, so its ranks
would train on, with nobody to see them. Refuses nothing: where a process's ancestors cannot be read, it watches none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

POLL = 1.0
"""Seconds between two looks."""


def watch() -> None:
    """Send this process a SIGTERM once the process that started it, or that one's own parent, is gone."""
    above = ancestors()
    if not above:
        return
    threading.Thread(target=_wait, args=(above,), name="launcher", daemon=True).start()


def ancestors() -> tuple[int, ...]:
    """Process numbers of the parent and of its parent, as far as there are such besides the first process."""
    found = []
    process = os.getppid()
    for _ in range(2):
        if process <= 1:
            break
        found.append(process)
        process = _parent(process)
    return tuple(found)


def _parent(process: int) -> int:
    """The parent of a process; 0 where it cannot be read."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _wait(above: tuple[int, ...]) -> None:
    while ancestors()[: len(above)] == above:
        time.sleep(POLL)
    print(f"rank {os.environ.get('RANK', '0')}: the launcher is gone; stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
