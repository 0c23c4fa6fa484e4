"""Ranks of launch/pretrain.py as real processes, forked from this warm one, each in a network namespace if named."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import free_port, import_engines
from tests.train.launched import Hook, rank_of_a_job


class Ranks:
    """The ranks of one job. ``processes`` and ``logs``: by rank."""

    def __init__(self, folder: Path, words: Sequence[str], environs: Sequence[dict[str, str]], hook: Hook | None):
        import_engines()
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("fork")
        self.logs = [folder / f"log.{rank}" for rank in range(len(environs))]
        self.processes = [
            context.Process(target=rank_of_a_job, args=(list(words), {**environ, "RANK": str(rank)}, log, hook))
            for rank, (environ, log) in enumerate(zip(environs, self.logs, strict=True))
        ]
        for process in self.processes:
            process.start()

    def wait(self, rank: int, seconds: float) -> int | None:
        """A rank's exit status; None while it runs after that many seconds."""
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text(encoding="utf-8")

    def end(self) -> list[int | None]:
        """Wait for all, and end what is left after a while; the exit statuses."""
        for process in self.processes:
            process.join(60)
        return self.close()

    def close(self) -> list[int | None]:
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes


@contextmanager
def started(
    folder: Path, inputs: Path, output: Path, *more: str, world: int = 2, stage: int = 2,
    environ: Sequence[dict[str, str]] | None = None, hook: Hook | None = None,
) -> Iterator[Ranks]:  # fmt: skip
    """Ranks of a job with ``more`` options; logs go to ``folder``. ``environ``: of each rank, besides the usual."""
    words = ["--ds_config", str(inputs / f"zero{stage}.json"), "--recipe", str(inputs / "launched.py")]
    words += ["--output", str(output), *more]
    port = str(free_port())
    usual = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    own = [{**usual, "LOCAL_RANK": str(rank), **(environ[rank] if environ else {})} for rank in range(world)]
    ranks = Ranks(folder, words, own, hook)
    try:
        yield ranks
    finally:
        ranks.close()


def steps(output: Path) -> int:
    """How many training records a run has written."""
    metrics = output / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").count('"train"') if metrics.exists() else 0


def wait_until(ready: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def root(*words: str) -> None:
    """Run a command that needs root; skips where it may not run."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip(f"{words[0]} is not installed: apt-get install iproute2")
    if done.returncode:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()} (root is needed)")
