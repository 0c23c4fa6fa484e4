"""How the ranks of one job talk: a communicator with a rank, a size and one collective, and what is built on it.

Ranks are this process `ALONE`, those of an MPI launcher (`world`), forked ones (`forked`), or torch.distributed's
(`distributed`). An error on one rank is raised by every rank, so none waits for a message that never comes. mpi4py is
imported here only, and only under an MPI launcher.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from bert2bert.errors import UserError

_LAUNCHED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")
T = TypeVar("T")


class Comm(Protocol):
    """A group of ranks, seen from one of them."""

    @property
    def rank(self) -> int:
        """This rank's number; rank 0 reports and commits."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def allgather(self, item: T) -> list[T]:
        """The items (anything that pickle takes) of all ranks, in their order, on every rank."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def allgather(self, item: T) -> list[T]:
        return [item]


ALONE = Alone()


class Mpi:
    """The ranks of an MPI launcher."""

    def __init__(self, comm: Any) -> None:
        self.rank, self.size, self._comm = int(comm.rank), int(comm.size), comm

    def allgather(self, item: T) -> list[T]:
        found: list[T] = self._comm.allgather(item)
        return found

    def abort(self, code: int) -> None:
        """End all ranks with this exit status."""
        self._comm.Abort(code)


def world() -> Comm:
    """The ranks of the MPI launcher that started this process (mpirun, or srun with PMI); `ALONE` without one.

    Raises UserError where mpi4py does not load.
    """
    if not any(name in os.environ for name in _LAUNCHED_BY_MPI):
        return ALONE
    try:
        from mpi4py import MPI  # here, for only an MPI launcher needs it
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel finds no MPI library
        raise UserError(
            f"started by an MPI launcher, but mpi4py does not load: {error}. Install mpi4py for the MPI that "
            "the launcher belongs to, or run without the launcher."
        ) from None
    return Mpi(MPI.COMM_WORLD)


def gather(comm: Comm, do: Callable[[], T]) -> list[T]:
    """Call ``do`` on every rank; what each returned, by rank, on every rank. No collective may be inside.

    If it fails on any rank, all raise: a UserError as it is, any other error with the number of its rank.
    """
    result, error = None, None
    try:
        result = do()
    except Exception as failure:
        error = failure
    shown = error if error is None or isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    found = comm.allgather((result, shown))
    failures = [(rank, failure) for rank, (_, failure) in enumerate(found) if failure is not None]
    if failures:
        rank, first = failures[0]
        if error is not None and not isinstance(error, UserError):
            raise error  # with its own traceback, on the rank that has it
        raise first if isinstance(first, UserError) else RuntimeError(f"rank {rank} stopped: {first}")
    return [result for result, _ in found]  # type: ignore[misc]


def on_first(comm: Comm, do: Callable[[], T]) -> T:
    """Call ``do`` on rank 0 while the others wait; its result, or its error, on every rank."""
    return gather(comm, lambda: do() if comm.rank == 0 else None)[0]  # type: ignore[return-value]


def together(comm: Comm, do: Callable[[], T]) -> T:
    """Call ``do`` on every rank and return this rank's own result, of any kind; if one rank fails, all do."""
    results: list[T] = []
    gather(comm, lambda: results.append(do()))
    return results[0]
