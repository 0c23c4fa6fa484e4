"""The signals that ask a run to stop, held from a process's first line to its last, until all ranks leave together.

Ctrl-C, a batch system's notice and a launcher's SIGTERM mean the same: finish the step under way, write a checkpoint,
leave with `STOPPED`. A signal that comes while Python still imports, or in the last line of a process, is held alike:
else the launcher would see a rank that a signal killed. Ctrl-C pressed again changes nothing and says so; pressed a
third time it ends the process at once, whatever it waits for. A terminal or launcher that is gone, and no longer takes
what is printed, keeps no run from its checkpoint. Imports nothing heavy. Refuses nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

STOPPED = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped before its last step: the same command goes on with --resume."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PRESS = 1.0  # seconds: a launcher hands on a Ctrl-C that the terminal has sent to its ranks, too


class Stop:
    """``caught``: the first of `SIGNALS` that this process got, None before. Ends with `release`. Main thread only."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # Python runs handlers between two lines of the main thread, which may wait in a collective: so a thread listens
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _note(self, number: int, frame: object) -> None:
        self.caught = self.caught or signal.Signals(number)

    def _listen(self) -> None:
        presses, last = 0, -_PRESS
        while came := os.read(self._read_fd, 1):
            if came[0] != signal.SIGINT or time.monotonic() - last < _PRESS:
                continue
            presses, last = presses + 1, time.monotonic()
            if presses == 2:
                _say("stopping: what is being computed or written is finished first; Ctrl-C once more ends it at once")
            elif presses > 2:
                _say("ended at once by Ctrl-C; checkpoints written before are whole")
                os._exit(128 + signal.SIGINT)
        os.close(self._read_fd)

    def release(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write_fd)


class _Patient:
    """An output stream whose reader may go away: what nobody takes any more is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_stop: Stop | None = None


def hold() -> None:
    """Hold the signals of this process for the rest of its life: the first thing that a program does."""
    global _stop
    if _stop is None:
        _stop = Stop()
        sys.stdout, sys.stderr = _Patient(sys.stdout), _Patient(sys.stderr)


@contextlib.contextmanager
def held() -> Iterator[Stop]:
    """The `Stop` of the process; where no program made one, one for as long as the statement lasts."""
    stop = _stop or Stop()
    try:
        yield stop
    finally:
        if stop is not _stop:
            stop.release()


def leave(status: int) -> NoReturn:
    """End the process: the last thing that a program does. Python would give the signals back as it goes down, and
    threads of C++ that are alive then (a store that was never reached) would abort it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def asked(stop: Stop) -> list[float]:
    """This rank's share in asking all to stop: numbers to be summed over the ranks, for `answer`."""
    return [float(stop.caught is number) for number in SIGNALS]


def answer(totals: list[float]) -> str | None:
    """The name of the signal that some rank got, from sums of what `asked` gave."""
    return next((number.name for number, ranks in zip(SIGNALS, totals, strict=True) if ranks), None)


def _say(text: str) -> None:
    """On rank 0, past Python's streams, which the main thread may be in the middle of."""
    from bert2bert.errors import UserError  # here, for this module is a program's first line
    from bert2bert.ranks.launcher import discover  # likewise

    with contextlib.suppress(OSError, UserError):
        if discover().rank == 0:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
