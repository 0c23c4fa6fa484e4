"""Connections between the ranks of a run, for short lines of JSON that never make a rank wait. Refuses nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """A lost rank: its number, its host, and what is known of its end."""

    rank: int
    host: str
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.why}"


@dataclass
class Peer:
    """The other end of a connection. ``heard``: when, by this process's clock; ``at``: where its main thread is."""

    link: socket.socket
    heard: float
    rank: int = -1
    host: str = "?"
    at: str = ""
    rest: bytes = b""
    left: bool = False
    lines: list[Line] = field(default_factory=list)

    def read(self) -> bool:
        """Take what has come into ``lines``; whether the connection is open still."""
        try:
            while data := self.link.recv(1 << 16):
                *whole, self.rest = (self.rest + data).split(b"\n")
                self.lines += [json.loads(line) for line in whole]
                self.heard = time.monotonic()
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        return False

    def send(self, line: Line) -> None:
        """Send a line, if the network takes it now: what it does not take would be late."""
        with contextlib.suppress(OSError):
            self.link.send(json.dumps(line).encode() + b"\n")


def serve() -> socket.socket:
    """A socket that listens at a free port of every interface."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except (OSError, ValueError):  # no IPv6 here
        server = socket.create_server(("", 0), backlog=1024)
    server.setblocking(False)
    return server
