"""Signs of life between the ranks of a run: who was killed, is frozen or cut off, or has failed, and on which host.

A collective notices a lost rank late, names no rank, and on a GPU cannot be left. So a thread of every rank keeps a
connection of its own to rank 0, over which both send a line every few seconds. A connection that closes without a last
word is a rank that was killed; one that is silent for the whole time-out, a rank that is frozen or cut off; a rank that
fails says why. Rank 0 reports the first of these to all. A rank whose main thread does not come out of its collective
within `GRACE` seconds is ended by the thread, so that none outlives another for long, whatever it waits in.

No clock of another host is used. Refuses (UserError) to go on without a connection to rank 0, and, after having been
frozen for so long that the others must have left, to write.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bert2bert.errors import UserError
from bert2bert.ranks.comm import Comm
from bert2bert.ranks.peers import Line, Loss, Peer, serve

GRACE = 4.0
"""Seconds that a rank has to end by itself once another is lost."""
LOST = 2
"""Exit status of a rank that is ended because another is lost: that of every failure which a user can remedy."""
_BEAT = 2.0
_PATIENCE = 3.0
_PACKAGE = Path(__file__).resolve().parents[1]


class Heartbeat:
    """This rank's signs of life. ``loss``: the first lost rank that this one knows of. Made by `watched`."""

    def __init__(self, comm: Comm, timeout: float, address: str) -> None:
        self.rank, self.size, self.timeout = comm.rank, comm.size, timeout
        self.loss: Loss | None = None
        self.at_end: Callable[[str], None] = lambda why: None
        self._beat = min(_BEAT, timeout / 5)
        self._known, self._closed = threading.Event(), threading.Event()
        self._drains: float | None = None  # until when it still reads, after it has failed
        self._wake, self._woken = socket.socketpair()
        self._main = threading.main_thread().ident
        self._peers: list[Peer] = []
        self._ticked = time.monotonic()
        self._woke = 0.0  # when this process was continued last
        self._lock = threading.Lock()  # one thread at a time sends
        server = serve() if self.rank == 0 else None
        token = secrets.token_hex(8)
        port = server.getsockname()[1] if server is not None else 0
        host, port, self._token = comm.allgather((socket.gethostname(), port, token))[0]
        if server is None:
            self._join(address, port, host)
        comm.allgather(None)  # all are there, or have failed
        self._thread = threading.Thread(target=self._run, args=(server,), name="heartbeat", daemon=True)
        self._thread.start()

    def _join(self, address: str, port: int, host: str) -> None:
        try:
            link = socket.create_connection((address, port), timeout=min(self.timeout, 30.0))
        except OSError as error:
            raise UserError(
                f"rank {self.rank} on {socket.gethostname()} cannot reach port {port} of rank 0 at {address} "
                f"({error.strerror or error}); let the firewall pass all ports between the nodes of a job"
            ) from None
        link.setblocking(False)
        peer = Peer(link, time.monotonic(), 0, host)
        peer.send({"token": self._token, "rank": self.rank, "host": socket.gethostname()})
        self._peers.append(peer)

    def _run(self, server: socket.socket | None) -> None:
        selector = selectors.DefaultSelector()
        for peer in self._peers:
            selector.register(peer.link, selectors.EVENT_READ, peer)
        if server is not None:
            selector.register(server, selectors.EVENT_READ, None)
        selector.register(self._woken, selectors.EVENT_READ, None)
        began = sent = time.monotonic()
        while self._goes_on():
            for key, _ in selector.select(self._beat / 2):
                if key.fileobj is server:
                    self._accept(server, selector)
                elif key.data is not None and not self._hear(key.data):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - self._ticked > self.timeout / 2:  # frozen: what the others sent meanwhile was read just now
                began = self._woke = now
                for peer in self._peers:
                    peer.heard = now
            self._ticked = now
            if self._drains is None:
                if now - sent >= self._beat:
                    sent = now
                    self._send({"at": self._place()})
                self._judge(now, began)
        if self.loss is not None and not self._closed.is_set():
            self._give_up(self.loss)

    def _goes_on(self) -> bool:
        if self._drains is not None:  # a connection that closes with unread lines in it loses the last word
            return time.monotonic() < self._drains and not all(peer.left for peer in self._peers)
        return not self._closed.is_set() and self.loss is None

    def _accept(self, server: Any, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            link, _ = server.accept()
            link.setblocking(False)
            peer = Peer(link, time.monotonic())
            selector.register(link, selectors.EVENT_READ, peer)

    def _hear(self, peer: Peer) -> bool:
        """Take in what another rank says; whether it may say more."""
        is_open = peer.read()
        for line in peer.lines:
            if peer.rank < 0:
                if line.get("token") != self._token:
                    peer.link.close()
                    return False
                peer.rank, peer.host = int(line["rank"]), str(line["host"])
                self._peers.append(peer)
            peer.at = line.get("at", peer.at)
            if "lost" in line:
                self._lose(Loss(*line["lost"]))
            if "left" in line:
                peer.left = True
                if line["left"] and self._drains is None:
                    self._lose(Loss(peer.rank, peer.host, f"has failed: {line['left']}"))
        peer.lines.clear()
        if not is_open and peer.rank >= 0 and not peer.left and not self._closed.is_set():
            self._lose(
                Loss(peer.rank, peer.host, "has ended without a word: it was killed (the kernel does so where memory "
                "runs out), or crashed")
            )  # fmt: skip
        peer.left = peer.left or not is_open
        return is_open

    def _judge(self, now: float, began: float) -> None:
        for peer in self._peers:
            if not peer.left and now - peer.heard > self.timeout:
                self._lose(Loss(peer.rank, peer.host, self._silence))
        if self.rank == 0 and len(self._peers) < self.size - 1 and now - began > self.timeout:
            there = {peer.rank for peer in self._peers}
            missing = next(rank for rank in range(1, self.size) if rank not in there)
            self._lose(Loss(missing, "its host", self._silence))

    @property
    def _silence(self) -> str:
        return (
            f"has given no sign of life for {self.timeout:g} s (--timeout): it is frozen, its host is down, or the "
            "network between is cut"
        )

    def _lose(self, loss: Loss) -> None:
        if self.loss is None:
            self.loss = loss
            if self.rank == 0:
                self._send({"lost": [loss.rank, loss.host, loss.why]})
            self._known.set()

    def _send(self, line: Line) -> None:
        with self._lock:
            for peer in self._peers:
                if not peer.left:
                    peer.send(line)

    def _give_up(self, loss: Loss) -> None:
        """End this process if its main thread does not."""
        if self._closed.wait(GRACE):
            return
        why = self.explain(loss)
        self.at_end(why)
        os.write(2, f"error{f' on rank {self.rank}' if self.rank else ''}: {why}\n".encode())
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(LOST)

    def explain(self, loss: Loss) -> str:
        """A lost rank in words, for this one."""
        if loss.rank == self.rank:
            return (
                f"rank {self.rank} on {loss.host} gave no sign of life for {self.timeout:g} s (--timeout), so the "
                "others have ended: it was frozen, or cut off from them. It writes nothing more"
            )
        return str(loss)

    def _place(self) -> str:
        """Where the main thread is: the innermost line of this package."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE):
                return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}, {frame.f_code.co_name}"
            frame = frame.f_back
        return ""

    def news(self) -> Loss | None:
        """The lost rank, after waiting a few seconds for it to become known."""
        self._known.wait(_PATIENCE)
        return self.loss

    def elsewhere(self) -> str:
        """Where the ranks are that are not where rank 0 is, as far as this rank knows (rank 0 does), in words."""
        mine = self._place()
        odd = [peer for peer in self._peers if self.rank == 0 and peer.at != mine]
        if not odd:
            return ""
        named = [f"rank {peer.rank} on {peer.host} at {peer.at or 'an unknown place'}" for peer in odd[:4]]
        more = f" and {len(odd) - 4} more at {len({peer.at for peer in odd})} places" if len(odd) > 4 else ""
        return f"; this one waits at {mine}, " + ", ".join(named) + more

    def check(self) -> None:
        """Raise UserError if another rank is lost, or if the others have given this one up. Before a file is written:
        a rank that was frozen must not write into what another start of the run writes now."""
        until = time.monotonic() + max(_PATIENCE, 3 * self._beat)
        while self.loss is None and not self._closed.is_set() and not self._awake():
            if time.monotonic() > until:
                raise UserError(
                    f"rank {self.rank} on {socket.gethostname()} was frozen, and the others show no sign of life "
                    "since. It writes nothing more"
                )
            time.sleep(0.05)
        if self.loss is not None:
            raise UserError(self.explain(self.loss))

    def _awake(self) -> bool:
        """Whether this process was not frozen just now, or has heard the others since."""
        if time.monotonic() - self._ticked > self.timeout / 2:
            return False
        return all(peer.left or peer.heard > self._woke for peer in self._peers)

    def close(self, words: str | None) -> None:
        """Leave. ``words``: what this rank failed of, if it did; the others hear it if they know of no other loss."""
        if words is not None:
            self._drains = time.monotonic() + 2 * GRACE
        self._closed.set()
        if self.loss is not None:
            self._send({"lost": [self.loss.rank, self.loss.host, self.loss.why]})
        self._send({"left": None if self.loss is not None else words})
        self._wake.send(b".")
        if words is None:
            self._thread.join(2 * self._beat)
            for peer in self._peers:
                peer.link.close()


_current: Heartbeat | None = None


@contextlib.contextmanager
def watched(comm: Comm, timeout: float) -> Iterator[None]:
    """Watch the ranks for as long as the statement lasts. Collective. ``timeout``: seconds of silence after which a
    rank counts as lost. MASTER_ADDR is rank 0's host. Nothing is watched where there is one rank."""
    global _current
    if comm.size == 1:
        yield
        return
    _current = heartbeat = Heartbeat(comm, timeout, os.environ["MASTER_ADDR"])
    try:
        yield
    except BaseException as error:
        heartbeat.close(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    with contextlib.suppress(RuntimeError):  # who is lost now takes nothing of the run with it
        comm.allgather(None)
    _current = None
    heartbeat.close(None)


def lost(slow: bool) -> str:
    """What is known, after a few seconds, of the rank for which a collective failed. ``slow``: it timed out."""
    if _current is None:
        return ""
    if (loss := _current.news()) is not None:
        return _current.explain(loss)
    return "all ranks give signs of life, so one of them hangs" + _current.elsewhere() if slow else ""


def at_end(call: Callable[[str], None]) -> None:
    """Let ``call(why)`` be the last thing that is done where a rank is ended because another is lost."""
    if _current is not None:
        _current.at_end = call


def check() -> None:
    """`Heartbeat.check` of the run under way, if one is."""
    if _current is not None:
        _current.check()
