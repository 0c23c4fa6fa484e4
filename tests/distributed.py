"""Run a function on W real ranks (gloo) in forked workers: about 2 s a test, for torch and deepspeed are imported once.

The parent must never start a process group or torch threads of its own before a fork (`torch.set_num_threads(1)` in
conftest). Every collective has a time-out, and a rank that raises fails the test with its own traceback while the other
ranks are killed, so no test can hang.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch


@cache
def import_engines() -> None:
    """Import DeepSpeed once, before any fork, and keep it from compiling its shared-memory collective (needs g++)."""
    # Every forked rank would import these again, ten seconds each under load: an optimizer imports torch._dynamo, and
    # DeepSpeed's Muon module compiles, which imports inductor.
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gc.freeze()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _worker(
    rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], seconds: float, out: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage at every start of stage 3, which would look through all that was imported
    try:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timedelta(seconds=seconds))
        out.put((rank, True, fn(*args)))
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
    finally:
        out.close()
        out.join_thread()
        os._exit(0)  # no interpreter shutdown: gloo and DeepSpeed threads may outlive the test


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list[Any]:
    """Call ``fn(*args)`` on ``world`` forked ranks inside one gloo group; the ranks' results, by rank.

    Results must pickle (tensors go as numpy or as cloned CPU tensors). Raises RuntimeError with the rank's traceback.
    """
    import_engines()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_worker, args=(r, world, port, fn, args, timeout, results), daemon=True)
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world:
            try:
                rank, ok, value = results.get(timeout=0.5)
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if p.exitcode is not None and r not in found]
                if dead and results.empty():
                    raise RuntimeError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}") from None
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{world} ranks of {fn.__name__} took over {timeout} s") from None
                continue
            if not ok:
                raise RuntimeError(f"rank {rank} of {fn.__name__} failed:\n{value}")
            found[rank] = value
    finally:
        for process in ranks:
            if len(found) < world:
                process.kill()
            process.join(10)
    return [found[r] for r in range(world)]
