"""Ranks without MPI: processes of this machine that run one growth together, and one more that watches them.

The ranks are forked before any tensor is computed on (threads do not survive a fork) and talk through pipes to rank 0,
as a `comm.Comm`, so all else is the code that MPI ranks run. The
process that forked them only waits: a rank that is killed, or that dies of reading a memory-mapped file that was cut
short (SIGBUS, which no process can handle), becomes an error message, and no rank outlives another or the watcher.

Refuses fewer than one rank (InvalidConfig). A lost rank is a UserError.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.ranks.comm import Comm, T

_LOST = 70  # exit status of a rank that another has left alone
_GRACE = 10.0  # seconds in which ranks end after the first has
_CAUSES = {
    signal.SIGBUS: "a file of the source was cut short while it was read, or its disk cannot be read",
    signal.SIGKILL: "killed by somebody or, if memory ran out, by the kernel",
}


class Forked:
    """The forked ranks. ``links``: on rank 0 to each other rank in order, on the others to rank 0 alone."""

    def __init__(self, rank: int, size: int, links: list[Any]) -> None:
        self.rank, self.size, self._links = rank, size, links

    def allgather(self, item: T) -> list[T]:
        """The items of all ranks, in their order, on every rank. Ends this process if another rank is gone."""
        try:
            if self.rank > 0:
                self._links[0].send(item)
                received: list[T] = self._links[0].recv()
                return received
            items = [item, *(link.recv() for link in self._links)]
            for link in self._links:
                link.send(items)
            return items
        except (EOFError, ConnectionError):
            os._exit(_LOST)  # as if killed: the watcher says why


def _rank(rank: int, pipes: list[tuple[Any, Any]], alive: tuple[int, int], call: Callable[[Comm], int]) -> None:
    os.close(alive[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, signal.SIG_IGN
        )  # a terminal sends them to all: the watcher receives them, and ends the ranks
    threading.Thread(target=lambda: (os.read(alive[0], 1), os._exit(_LOST)), daemon=True).start()
    for i, (near, far) in enumerate(pipes):  # only what is this rank's own, or the end of another goes unnoticed
        if rank > 0:
            near.close()
        if i != rank - 1:
            far.close()
    links = [near for near, _ in pipes] if rank == 0 else [pipes[rank - 1][1]]
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // (len(pipes) + 1)))
    sys.exit(call(Forked(rank, len(pipes) + 1, links)))


def run(count: int, call: Callable[[Comm], int]) -> int:
    """Call ``call(comm)`` on ``count`` forked ranks and wait; the largest of their exit statuses.

    Raises UserError if a rank was ended by a signal, after the others have been ended too.
    """
    if count < 1:
        raise InvalidConfig(f"--workers is {count}; expected at least 1, the number of processes")
    context = multiprocessing.get_context("fork")
    pipes: list[tuple[Any, Any]] = [context.Pipe() for _ in range(count - 1)]
    alive = os.pipe()
    sys.stdout.flush()
    ranks = [context.Process(target=_rank, args=(rank, pipes, alive, call), daemon=True) for rank in range(count)]
    try:
        for process in ranks:
            process.start()
        os.close(alive[0])
        for end in (end for pipe in pipes for end in pipe):
            end.close()
        return _watch(ranks)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
        os.close(alive[1])


def _watch(ranks: list[Any]) -> int:
    running, deadline = dict(enumerate(ranks)), float("inf")
    codes: dict[int, int] = {}
    while running and time.monotonic() < deadline:
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready = connection.wait([process.sentinel for process in running.values()], wait)
        for rank in [rank for rank, process in running.items() if process.sentinel in ready]:
            process = running.pop(rank)
            process.join()
            codes[rank] = process.exitcode
            if process.exitcode < 0:
                number = signal.Signals(-process.exitcode)
                cause = f": {_CAUSES[number]}" if number in _CAUSES else ""
                raise UserError(
                    f"process {process.pid} (rank {rank} of {len(ranks)}) was ended by {number.name}{cause}. Nothing "
                    "was committed; what is finished is kept, and the same command goes on from there."
                )
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + _GRACE)
    if all(code in (0, _LOST) for code in codes.values()) and _LOST in codes.values():
        raise UserError("a process of this growth ended without a word. Run the same command again.")
    return max(code for code in codes.values() if code != _LOST) if codes else 1
