"""Ctrl-C, SIGTERM and SIGHUP as an exception that unwinds a command, so that it ends with one line and its status.

A second one ends the process at once: what the first is unwinding may itself take long. Imports nothing heavy. Refuses
nothing. (A training run goes on to its next checkpoint instead: bert2bert.ranks.stopping.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GOES_ON = ("grow", "reshard")  # what they have finished is kept, and checked by the next run


class Interrupted(KeyboardInterrupt):
    """``number``: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the statement, signals raise `Interrupted` in the main thread. SIGHUP stays ignored under nohup."""
    came = list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(128 + number)
        raise Interrupted(number)

    with _handling(handle):
        yield


@contextlib.contextmanager
def at_once(command: str, prints: bool) -> Iterator[None]:
    """Within the statement, a signal ends the process: for a rank whose launcher will not wait, and whose work may be
    killed at any moment. prints: whether it is the rank that reports it."""

    def handle(number: int, frame: FrameType | None) -> None:
        if prints:
            with contextlib.suppress(OSError):
                os.write(2, f"{message(command, number)}\n".encode())
        os._exit(128 + number)

    with _handling(handle):
        yield


@contextlib.contextmanager
def _handling(handle: object) -> Iterator[None]:
    before = {}
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def message(command: str | None, number: int) -> str:
    """The line of a command that was ended by a signal."""
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"bert2bert{f' {command}' if command else ''}: {how}" + "; the same command goes on" * (command in _GOES_ON)


def end(command: str | None, error: KeyboardInterrupt) -> int:
    """Say it; the exit status."""
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    with contextlib.suppress(OSError):
        print(message(command, number), file=sys.stderr, flush=True)
    return 128 + number
