"""The files of one rank, written a few at a time: one waits for the disk while others are computed. Small files, which
cost Python time, are spread among large ones, which wait for the disk.

Numbers are computed, and digests of tensors taken, in a thread of the file's own; another digests its content and
writes it. So no file depends on another. Refuses nothing: the first error of a thread stops all, and is raised.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path

from bert2bert.checkpoints.commit.journal import Entry, Finisher
from bert2bert.checkpoints.job import FilePlan, Stopped, Tally
from bert2bert.files.disk import disk_errors
from bert2bert.files.sink import Sink

_LARGE = 1 << 20  # bytes of a file
_ROWS = 1 << 29  # bytes of rows, one of each file under way
THREADS = 5  # some wait for the source, too


def files_at_once(row: int) -> int:
    """How many files are written at a time where the largest row of a tensor has ``row`` bytes: every one of them holds
    a few blocks of rows, and fused experts' rows are whole experts."""
    return max(1, min(THREADS, _ROWS // max(row, 1)))


def write_files(root: Path, plans: Sequence[FilePlan], tally: Tally, finisher: Finisher, threads: int) -> None:
    """Write files, ``threads`` at a time, and hand them over. A file whose tensor data are not as many bytes as planned
    is a defect."""
    errors: list[BaseException] = []
    with disk_errors(root):
        for folder in {os.path.dirname(plan.name) for plan in plans}:
            os.makedirs(root / folder, exist_ok=True)

    def write(plan: FilePlan) -> None:
        if tally.stop.is_set():
            return
        try:
            _write(root, plan, tally, finisher, disk)
        except Stopped:
            pass  # another thread has the reason
        except BaseException as error:
            errors.append(error)
            tally.stop.set()

    with ThreadPoolExecutor(threads, "disk") as disk, ThreadPoolExecutor(threads, "writer") as pool:
        try:
            _start(disk, threads)
            wait([pool.submit(write, plan) for plan in _mixed(plans)])
        except BaseException:  # Ctrl-C comes to the main thread
            tally.stop.set()
            raise
    if errors:
        raise errors[0]


def _start(pool: Executor, threads: int) -> None:
    """Start all threads: a pool that cannot start one has taken the work all the same, which would surprise `Sink`."""
    met = threading.Barrier(threads)
    try:
        wait([pool.submit(met.wait) for _ in range(threads)])
    except BaseException:
        met.abort()
        raise


def _mixed(plans: Sequence[FilePlan]) -> list[FilePlan]:
    """Large files in their order, and small ones, in theirs, evenly between them."""
    parts = [plan for plan in plans if plan.payload >= _LARGE], [plan for plan in plans if plan.payload < _LARGE]
    placed = [((i + 0.5) / len(part), k, i) for k, part in enumerate(parts) for i in range(len(part))]
    return [parts[k][i] for _, k, i in sorted(placed)]


def _write(root: Path, plan: FilePlan, tally: Tally, finisher: Finisher, disk: Executor) -> None:
    path = root / plan.name
    tally.digests = {}  # of this file alone
    with disk_errors(path), Sink(path, disk) as file:
        written = plan.write(file)
    if written != plan.payload or file.size < plan.payload:
        raise RuntimeError(f"{plan.name}: planned {plan.payload} bytes of tensors, wrote {written}")
    finisher.add(plan.name, Entry(file.size, file.digest(), tally.digests))
