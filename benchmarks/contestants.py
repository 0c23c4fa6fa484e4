"""What benchmarks/growth.py times, each in a process of its own: the disk alone, `grow`, DeepSpeed's tools, a dry run.

python benchmarks/contestants.py NAME ARGUMENTS    (as JSON; prints what it found as a line of JSON)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import mmap
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

BLOCK = 1 << 24  # bytes
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop(folder: Path) -> None:
    """Sync a folder's files and drop their pages from the cache."""
    for path in files_of(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


@contextlib.contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Seconds, and the peak of anonymous memory above the present, of the body."""
    base, peak, done = _anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = time.perf_counter() - start
        done.set()
        sampler.join()
        found["memory"] = max(peak[0], _anonymous()) - base


def make(folder: str, config: dict[str, Any], stage: int) -> dict[str, Any]:
    """A source of random values, for two ranks."""
    import torch
    from sparse import fresh_spec

    from bert2bert.checkpoints.manifest import Manifest
    from bert2bert.checkpoints.target import Target
    from bert2bert.checkpoints.write import write_checkpoint

    spec = fresh_spec(config)
    pool = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02
    squares = pool.square() * 1e-3

    def values(name: str, state: str, start: int, stop: int) -> Any:
        shape = (stop - start, *spec.shapes[name][1:]) if spec.shapes[name] else ()
        numbers = squares if state == "exp_avg_sq" else pool  # over and over, from a place of the tensor's own
        first = (zlib.crc32(f"{name} {state}".encode()) + start * prod(shape[1:])) % len(pool)
        parts, count = [numbers[first : first + prod(shape)]], prod(shape)
        while (left := count - sum(map(len, parts))) > 0:
            parts.append(numbers[:left])
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)

    write_checkpoint(Path(folder), spec, values, Target("zero", stage, 2), manifest=Manifest(kind="growth"))
    return {}


def ready(source: str, count: int) -> None:
    """At the last moment before a contestant starts: memory for ``count`` bytes of files, for a virtual machine's host
    lends it slowly and takes it back soon; and the source on the disk alone."""
    block, scratch = bytes(BLOCK), Path(f"{source}.scratch")
    with open(scratch, "wb", buffering=0) as file:
        for _ in range(0, count, BLOCK):
            file.write(block)
    scratch.unlink()
    drop(Path(source))


def floor(source: str, target: str, count: int) -> dict[str, Any]:
    """Seconds to read every byte of the source, and to write and sync ``count`` bytes: in one file, in files of 64 MiB
    of which 8 are synced at a time, or in three files past the page cache, whichever is fastest on this disk."""
    buffer, folder = bytearray(BLOCK), Path(target)
    view = memoryview(buffer)
    ready(source, count)
    start = time.perf_counter()
    for path in files_of(Path(source)):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(view):
                pass
    read, seconds = time.perf_counter() - start, []
    buffer[:] = os.urandom(BLOCK)
    for size in (count, 4 * BLOCK):
        ready(source, count)
        folder.mkdir()
        start = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            for first in range(0, count, size):
                with open(folder / str(first), "wb", buffering=0) as file:
                    for at in range(first, min(first + size, count), BLOCK):
                        file.write(view[: min(BLOCK, first + size - at, count - at)])
                pool.submit(fsync_file, folder / str(first))
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(folder)
    if hasattr(os, "O_DIRECT"):
        ready(source, count)
        folder.mkdir()
        start = time.perf_counter()
        with contextlib.suppress(OSError), ThreadPoolExecutor(3) as pool:  # a file system may not take it
            list(pool.map(_past_cache, [folder / str(i) for i in range(3)], [count // 3] * 3))
            seconds.append(time.perf_counter() - start)
        shutil.rmtree(folder)
    return {"read_seconds": read, "write_seconds": min(seconds)}


def _past_cache(path: Path, count: int) -> None:
    block = mmap.mmap(-1, BLOCK // 4)  # begins at a page, as a direct write must
    block.write(os.urandom(len(block)))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        for _ in range(-(-count // len(block))):
            os.write(fd, block)
        os.fsync(fd)
    finally:
        os.close(fd)


def grow(source: str, target: str, config: str, count: int, how: dict[str, Any], workers: int) -> dict[str, Any]:
    """`grow`, alone or by forked workers, the change of the function not measured."""
    for module in ("universal.reader", "zero.reader", "zero.stage0_reader"):
        importlib.import_module(f"bert2bert.checkpoints.{module}")
    from bert2bert.checkpoints.target import Target
    from bert2bert.commands import grow as grow_command
    from bert2bert.ranks import forked as processes
    from bert2bert.ranks.comm import ALONE, Comm

    def run(comm: Comm = ALONE) -> int:
        grow_command.grow(
            Path(source), Path(target), Path(config), Target(**how), width="fpi", depth="stack", lossy=True,
            measure=False, comm=comm, say=lambda text: None,
        )  # fmt: skip
        return 0

    found: dict[str, Any] = {}
    ready(source, count)
    before = _written()
    with measured(found):
        if workers == 1:
            run()
        elif processes.run(workers, run):
            raise SystemExit("a worker failed")
    found["written"] = _written() - before
    return found


def _written() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))


def _expanded(plan: Any, state: str, load: Callable[[str, str], Any]) -> Any:
    """A grown tensor, whole, in the plainest way: index every dim of the source tensor, multiply."""
    import torch

    (term,) = plan.terms
    x = load(term.source, state)
    for d, dim in enumerate(term.dims):
        x = x.index_select(d, torch.from_numpy(dim.index))
        factor = dim.param if state == "fp32" else dim.grad
        if factor is not None:
            power = torch.from_numpy(factor**2 if state == "exp_avg_sq" else factor).float()
            x = x * power.view([-1 if i == d else 1 for i in range(x.ndim)])
    return x


def rival(kind: str, source: str, target: str, config: str, count: int) -> dict[str, Any]:
    """DeepSpeed's tool, then a naive expansion of what it gives."""
    import torch
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from bert2bert.growth.opened import open_growth

    growth = open_growth(Path(source), Path(config), width="fpi", depth="stack")
    plan, shapes = growth.plan, {name: p.shape for name, p in growth.model.parameters.items()}
    found: dict[str, Any] = {}
    out = Path(target)
    ready(source, count)
    with measured(found), contextlib.redirect_stdout(sys.stderr):
        if kind == "ds_to_universal":
            middle = out / "universal"
            tag = next(path for path in Path(source).iterdir() if path.is_dir())
            ds_to_universal(
                argparse.Namespace(
                    input_folder=str(tag), output_folder=str(middle), num_extract_workers=2, num_merge_workers=2,
                    keep_temp_folder=False, strict=True, inject_missing_state=True,
                )
            )  # fmt: skip

            def load(name: str, state: str) -> Any:
                stored = torch.load(middle / "zero" / name / f"{state}.pt", weights_only=False)  # just made
                flat = (stored["param"] if isinstance(stored, dict) else stored).reshape(-1)  # of ZeRO-3: bare, flat
                return flat[: prod(shapes[name])].view(shapes[name])

            for name, tensor in plan.tensors.items():
                folder = out / "grown" / "zero" / name
                folder.mkdir(parents=True)
                for state in STATES:
                    torch.save({"param": _expanded(tensor, state, load)}, folder / f"{state}.pt")
        else:
            weights = get_fp32_state_dict_from_zero_checkpoint(source)
            grown = {n: _expanded(t, "fp32", lambda name, _: weights[name]) for n, t in plan.tensors.items()}
            torch.save(grown, out / "pytorch_model.bin")
    start = time.perf_counter()
    drop(out)
    found["synced_seconds"] = found["seconds"] + time.perf_counter() - start
    return found


def dry_run(folder: str, pair: str) -> dict[str, Any]:
    import sparse

    # readers are imported when they are needed
    for module in ("hub.reader", "universal.reader", "zero.reader", "zero.stage0_reader"):
        importlib.import_module(f"bert2bert.checkpoints.{module}")
    found: dict[str, Any] = {}
    with measured(found):
        found |= sparse.dry_run(Path(folder), pair)
    return found


CONTESTANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make, "floor": floor, "grow": grow, "rival": rival, "dry_run": dry_run,
}  # fmt: skip


if __name__ == "__main__":
    print("\n" + json.dumps(CONTESTANTS[sys.argv[1]](*json.loads(sys.argv[2]))))
