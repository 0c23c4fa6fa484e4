"""The ranks of a run find each other before the first collective: on a store that rank 0 opens at
MASTER_ADDR:MASTER_PORT (under torchrun: its agent), where each signs in.

A rank that waits says so after `PATIENCE` seconds (rank 0 who is missing, another while it cannot reach rank 0), and
gives up when the time-out ends; a signal to any rank ends the wait of all. Refused, as InvalidConfig: a port that is
taken, an address that does not resolve, something else that answers there, two processes with one number, ranks that
were given different numbers of ranks. As UserError: ranks that do not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import torch.distributed

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.ranks import interfaces
from bert2bert.ranks.stopping import Stop

INIT = "bert2bert://"
"""What init_process_group is given for ``init_method`` after `meet`."""
PATIENCE = 10.0
_POLL = 0.2
_CODES = {"EADDRINUSE": "another process listens on it already, perhaps another job on this host", "EACCES": "no right"}


_met: Any = None


class Stopped(Exception):
    """A signal came to some rank while they waited for each other; its text is the signal's name."""


def meet(timeout: float, stop: Stop | None = None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Wait until all ranks are there; then `INIT` is how their process group starts. Raises Stopped, too.

    ``timeout``: seconds in all; ``environ``: with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
    the interface to the others is named there (`interfaces.choose`).
    """
    global _met
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    wait = _Wait(rank, world, f"{address}:{port}", timeout, stop)
    _resolve(address, port)
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _serve(wait, address, port) if rank == 0 and not agent else _reach(wait, address, port)
    prefix = f"bert2bert/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with _gone(wait):
        here, own = torch.distributed.PrefixStore(prefix, store), interfaces.toward(address)
        _sign_in(here, wait, own)
        others = (json.loads(here.get(f"rank/{number}"))["address"] for number in range(world))
        interfaces.choose(own, others, environ)
    store.set_timeout(timedelta(seconds=timeout))
    _met = torch.distributed.PrefixStore(prefix + "/group", store), rank, world


def _handler(url: str, **options: Any) -> Iterator[Any]:
    yield _met


torch.distributed.register_rendezvous_handler(INIT.partition(":")[0], _handler)


class _Wait:
    """How long this rank has waited. ``where``: host and port."""

    def __init__(self, rank: int, world: int, where: str, timeout: float, stop: Stop | None) -> None:
        self.rank, self.world, self.where, self.timeout, self.stop = rank, world, where, timeout, stop
        self.began, self.reported, self.signalled = time.monotonic(), False, 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    @property
    def left(self) -> float:
        return self.began + self.timeout - time.monotonic()

    @property
    def signal(self) -> str | None:
        """The name of the signal that this process got."""
        return None if self.stop is None or self.stop.caught is None else self.stop.caught.name

    @property
    def leaves(self) -> str | None:
        """The signal's name once rank 0 has had `PATIENCE` seconds to come since, so that all leave together."""
        if self.signal and not self.signalled:
            self.signalled = time.monotonic()
        waited = self.signalled and time.monotonic() - self.signalled >= PATIENCE
        return self.signal if waited or self.left <= 0 else None

    def pause(self, why: str) -> bool:
        """Sleep a little, after saying once why if that has lasted; whether there is time left."""
        if not self.reported and time.monotonic() - self.began >= PATIENCE:
            self.reported = True
            text = f"{self} waits: {why} (gives up after {self.timeout:g} s; --timeout sets that)"
            print(text, file=sys.stderr, flush=True)
        time.sleep(max(0.0, min(_POLL, self.left)))
        return self.left > 0


def _resolve(address: str, port: int) -> None:
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidConfig(
            f"MASTER_ADDR is {address!r}, which leads to no address ({getattr(error, 'strerror', None) or error}); "
            "expected the name or the address of rank 0's host, as the other hosts know it"
        ) from None


def _serve(wait: _Wait, address: str, port: int) -> Any:
    """Rank 0's store."""
    try:
        return torch.distributed.TCPStore(
            address, port, wait.world, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, min(wait.left, 30.0))),
        )  # fmt: skip
    except torch.distributed.DistNetworkError as error:
        cause = next((text for code, text in _CODES.items() if code in str(error)), None)
        if cause:
            raise InvalidConfig(
                f"MASTER_PORT is {port}, but rank 0 cannot listen on that port: {cause}. Give the launcher another "
                "(deepspeed and torchrun: --master_port N; mpirun, srun and one process: MASTER_PORT=N)"
            ) from None
        raise InvalidConfig(
            f"rank 0 cannot reach itself at {wait.where} ({_first_line(error)}); expected MASTER_ADDR to be its host"
        ) from None


def _reach(wait: _Wait, address: str, port: int) -> Any:
    """Another rank's way to the store: wait until something answers there, then see whether that is a store."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(wait.left, PATIENCE))).close()
            break
        except OSError as error:
            if name := wait.leaves:
                raise Stopped(name) from None
            if not wait.pause(f"nobody answers at {wait.where}, where rank 0 should be"):
                raise UserError(
                    f"{wait}: nobody answered at {wait.where} in {wait.timeout:g} s ({error.strerror or error}). Rank "
                    "0 has not started or has ended, MASTER_ADDR or MASTER_PORT differs from its own, or a firewall is "
                    "between"
                ) from None
    found: list[Any] = []

    def open_store() -> None:
        try:
            found.append(
                torch.distributed.TCPStore(
                    address, port, wait.world, is_master=False, timeout=timedelta(seconds=max(1.0, wait.left))
                )
            )
        except Exception as error:
            found.append(error)

    threading.Thread(target=open_store, daemon=True).start()  # torch waits for ever where no store answers
    while not found and not wait.leaves and wait.pause(f"what answers at {wait.where} is silent"):
        pass
    if not found and (name := wait.leaves):
        raise Stopped(name)
    if not found or isinstance(found[0], Exception):
        detail = f" ({_first_line(found[0])})" if found else ""
        raise InvalidConfig(
            f"{wait}: what answers at {wait.where} is not rank 0 of a run{detail}. Another program listens there, or "
            "rank 0 has ended meanwhile; give the launcher another MASTER_PORT"
        )
    return found[0]


def _sign_in(store: Any, wait: _Wait, address: str | None) -> None:
    """Leave this rank's name and address, and wait for all; rank 0 looks who is there and lets the others know how it
    ends."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    key = f"rank/{wait.rank}"
    if store.add(f"taken/{wait.rank}", 1) > 1:
        other = json.loads(store.get(key))["me"] if store.check([key]) else "another process"
        raise InvalidConfig(
            f"{other} is {wait} at {wait.where} already, and {me} was started as the same: two jobs use one "
            "MASTER_PORT, or one number was given twice. Let every job have its own port and every rank its own RANK"
        )
    store.set(key, json.dumps({"me": me, "world": wait.world, "address": address}))
    if wait.rank == 0:
        verdict = _verdict(store, wait)
        store.set("verdict", json.dumps(verdict))
        if verdict:
            time.sleep(2 * _POLL)  # the store ends with this process: let the others read it
    else:
        wait.reported = True  # rank 0 reports for all
        while not store.check(["verdict"]):
            if wait.signal:
                store.set("signal", wait.signal)
            if not wait.pause("") and wait.left < -PATIENCE:  # its clock may have begun later
                raise UserError(f"{wait}: rank 0 at {wait.where} did not find all ranks in {wait.timeout:g} s")
        verdict = json.loads(store.get("verdict"))
    if "signal" in verdict:
        raise Stopped(verdict["signal"])
    if verdict:
        raise UserError(verdict["error"])


def _verdict(store: Any, wait: _Wait) -> dict[str, str]:
    """Wait until all ranks have signed in; nothing, or the "error" with them, or the "signal" that one got."""
    keys = {rank: f"rank/{rank}" for rank in range(wait.world)}
    there: dict[int, Any] = {}
    while len(there) < wait.world:
        there |= {r: json.loads(store.get(key)) for r, key in keys.items() if r not in there and store.check([key])}
        for rank, other in there.items():
            if other["world"] != wait.world:
                return {
                    "error": f"rank {rank} ({other['me']}) was started as one of {other['world']} ranks, rank 0 as one "
                    f"of {wait.world}; expected the same WORLD_SIZE for every rank"
                }
        name = wait.signal or (store.get("signal").decode() if store.check(["signal"]) else None)
        if name:
            return {"signal": name}
        missing = [rank for rank in keys if rank not in there]
        shown = f"{', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}"
        count = f"{len(there)} of {wait.world} ranks"
        if missing and not wait.pause(f"{count} have come to {wait.where}; missing: {shown}"):
            return {
                "error": f"only {count} came to {wait.where} in {wait.timeout:g} s; missing: {shown}. Start all of "
                "them, or set WORLD_SIZE to the number that is started; --timeout gives them more time"
            }
    return {}


@contextlib.contextmanager
def _gone(wait: _Wait) -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistError as error:
        raise UserError(
            f"{wait}: rank 0 at {wait.where} has ended before the ranks had found each other ({_first_line(error)}); "
            "its own message says why"
        ) from error


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
