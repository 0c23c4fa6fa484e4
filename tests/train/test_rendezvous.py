"""Ranks that look for each other, in processes of their own: who waits says so, and what is wrong ends all of them."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed

from bert2bert.errors import UserError
from bert2bert.ranks import rendezvous, stopping
from tests.distributed import free_port


def _rank(environ: dict[str, str], timeout: float, patience: float, out: Any) -> None:
    """Meet, then add up over the group; what came of it, and what was printed."""
    sys.stderr = printed = io.StringIO()
    rendezvous.PATIENCE = patience
    os.environ.update(environ)
    with stopping.held() as stop:
        try:
            rendezvous.meet(timeout, stop)
            torch.distributed.init_process_group("gloo", init_method=rendezvous.INIT)
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            result = f"together: {total.item():g}"
            torch.distributed.barrier()
        except UserError as error:
            result = f"{type(error).__name__}: {error}"
        except rendezvous.Stopped as name:
            result = f"stopped: {name}"
    out.put((environ["RANK"], result, printed.getvalue()))
    out.close()
    out.join_thread()
    os._exit(0)  # whatever torch's threads still wait for


Start = Callable[..., Any]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start one rank; `start.results(n)` gives what n of them came to, by rank."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = []

    def begin(rank: int, world: int, port: int, timeout: float = 20.0, patience: float = 60.0, **more: str) -> Any:
        environ = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = context.Process(target=_rank, args=(environ | more, timeout, patience, out), daemon=True)
        process.start()
        processes.append(process)
        return process

    def results(count: int) -> list[tuple[str, str]]:
        """(how it ended, what it printed) of the next ranks to end, by rank."""
        return [rest for _, *rest in sorted(out.get(timeout=40) for _ in range(count))]

    begin.results = results
    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_ranks_that_come_in_any_order_meet(start: Start) -> None:
    port = free_port()
    for rank in (2, 1, 0):
        start(rank, 3, port, patience=0.0 if rank == 2 else 60.0)
        time.sleep(0.3)
    found = start.results(3)
    assert {result for result, _ in found} == {"together: 3"}
    assert found[2][1] == (
        f"rank 2 of 3 waits: nobody answers at 127.0.0.1:{port}, where rank 0 should be (gives up after 20 s; "
        "--timeout sets that)\n"
    )
    assert not found[0][1] and not found[1][1]


def test_rank_0_says_who_is_missing_and_gives_up_for_all(start: Start) -> None:
    port = free_port()
    for rank in (0, 2):
        start(rank, 4, port, timeout=2.0, patience=0.5)
    found = start.results(2)
    error = f"UserError: only 2 of 4 ranks came to 127.0.0.1:{port} in 2 s; missing: 1, 3. Start all of them, or set"
    assert all(result.startswith(error) for result, _ in found), found
    assert f"rank 0 of 4 waits: 2 of 4 ranks have come to 127.0.0.1:{port}; missing: 1, 3 (gives up" in found[0][1]
    assert found[0][1].count("\n") == 1 and not found[1][1]


def test_nobody_answers(start: Start) -> None:
    port = free_port()
    start(1, 2, port, timeout=1.5, patience=0.5)
    ((result, printed),) = start.results(1)
    assert f"UserError: rank 1 of 2: nobody answered at 127.0.0.1:{port} in 1.5 s (Connection refused)" in result
    assert printed.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_something_else_has(start: Start, rank: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        start(rank, 2, port, timeout=2.0)
        ((result, _),) = start.results(1)
    if rank == 0:
        assert f"InvalidConfig: MASTER_PORT is {port}, but rank 0 cannot listen on that port: another process" in result
    else:
        assert f"what answers at 127.0.0.1:{port} is not rank 0 of a run" in result


@pytest.mark.parametrize("address", ["no.such.host.invalid", "127.0.0.1:29500", "tcp://127.0.0.1", "x" * 300, "a b"])
def test_an_address_that_does_not_resolve(start: Start, address: str) -> None:
    for rank in (0, 1):
        start(rank, 2, free_port(), MASTER_ADDR=address)
    for result, _ in start.results(2):
        assert result.startswith(f"InvalidConfig: MASTER_ADDR is {address!r}, which leads to no address (")


def test_one_number_given_twice(start: Start) -> None:
    """Or two jobs with one port: the second is refused, the first goes on."""
    port = free_port()
    start(0, 3, port)
    start(1, 3, port)
    time.sleep(1.0)
    start(1, 3, port)
    ((second, _),) = start.results(1)
    assert second.startswith("InvalidConfig: process ") and "is rank 1 of 3 at 127.0.0.1" in second
    start(2, 3, port)
    assert {result for result, _ in start.results(3)} == {"together: 3"}


def test_ranks_that_were_given_different_worlds(start: Start) -> None:
    port = free_port()
    start(0, 2, port)
    start(1, 4, port)
    for result, _ in start.results(2):
        assert "was started as one of 4 ranks, rank 0 as one of 2; expected the same WORLD_SIZE" in result


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_any_rank_ends_the_wait_of_all(start: Start, signalled: int) -> None:
    port = free_port()
    ranks = [start(rank, 3, port) for rank in (0, 1)]
    time.sleep(1.0)
    os.kill(ranks[signalled].pid, signal.SIGTERM)
    assert {result for result, _ in start.results(2)} == {"stopped: SIGTERM"}


def test_a_signal_to_a_rank_that_is_alone_ends_it(start: Start) -> None:
    process = start(1, 2, free_port(), patience=1.0)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert start.results(1)[0][0] == "stopped: SIGTERM"


def test_a_rank_that_is_told_to_stop_waits_for_the_others_to_hear_it(start: Start) -> None:
    port = free_port()
    process = start(1, 2, port)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    start(0, 2, port)  # still importing until now
    results = {result for result, _ in start.results(2)}
    assert results in ({"stopped: SIGTERM"}, {"together: 2"})  # or rank 0 did not look in time: a step tells it


def test_rank_0_is_killed_while_the_others_wait(start: Start) -> None:
    port = free_port()
    first = start(0, 3, port)
    start(1, 3, port)
    time.sleep(1.0)
    first.kill()
    ((result, _),) = start.results(1)
    assert f"UserError: rank 1 of 3: rank 0 at 127.0.0.1:{port} has ended before the ranks had found" in result
