"""What ends a run from outside: a rank that dies or hangs, a taken port, a disk that is full or read-only, a torn file.

Every rank that is left ends with status 2 and a message that says what to do, and no traceback. The ranks are forked
from this warm process and run launch/pretrain.py's own main.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import free_port
from tests.train.launched import rank_of_a_job, write_configs, write_inputs

MORE = ["--set", "phases.0.steps=3", "phases.1.steps=30", "checkpoint_every=2", "log_every=1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    write_configs(folder)
    return folder


def _blow(rank: int, blow: tuple[int, int, signal.Signals]) -> None:
    """The rank of ``blow`` gets its signal in its step."""
    from bert2bert.train import loop

    original = loop.Draw

    def draw(step: int, *rest: Any) -> Any:
        if (rank, step) == blow[:2]:
            os.kill(os.getpid(), blow[2])
        return original(step, *rest)

    loop.Draw = draw


def run(
    inputs: Path, output: Path, *more: str, world: int = 2, stage: int = 2, blow: Any = None, **environ: str
) -> list[tuple[int | None, str]]:
    """(exit status, log) of each rank; the rank of ``blow`` (rank, step, signal) gets that signal in that step."""
    context = multiprocessing.get_context("fork")
    words = ["--ds-config", str(inputs / f"zero{stage}.json"), "--recipe", str(inputs / "launched.py")]
    words += ["--output", str(output), *more]
    usual = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    hook = None if blow is None else partial(_blow, blow=blow)
    logs = [inputs / f"log.{rank}" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **usual}
        process = context.Process(target=rank_of_a_job, args=(words, own | environ, log, hook))
        process.start()
        ranks.append(process)
    try:
        for process in ranks:
            if blow is None or process is not ranks[blow[0]]:
                process.join(60)
    finally:
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


@pytest.mark.parametrize(("victim", "stage"), [(1, 1), (0, 2), (1, 3)])
def test_a_rank_is_killed(inputs: Path, tmp_path: Path, victim: int, stage: int) -> None:
    found = run(inputs, tmp_path / "run", *MORE, stage=stage, blow=(victim, 4, signal.SIGKILL))
    code, log = found[1 - victim]
    assert code == 2, log
    assert "Traceback" not in log
    last = log.splitlines()[-1]
    assert f"rank {1 - victim} lost the connection to another rank in step 5 (phase 'full') (" in last, log
    assert last.endswith(f"The newest checkpoint is of step 4; continue with --resume {tmp_path / 'run'}")
    if stage == 2:
        again = run(inputs, tmp_path / "run", *MORE, "phases.1.steps=3", "--resume", str(tmp_path / "run"))
        assert [code for code, _ in again] == [0, 0], again
        assert "at step 4 of 6" in again[0][1]


def test_a_rank_hangs(inputs: Path, tmp_path: Path) -> None:
    found = run(inputs, tmp_path / "run", *MORE, "--timeout", "4", blow=(1, 1, signal.SIGSTOP))
    code, log = found[0]
    assert code == 2 and "Traceback" not in log, log
    assert "rank 0 waited for another rank for longer than --timeout allows in step 2" in log
    assert log.rstrip().endswith("No checkpoint was written yet; the same command starts again")


def test_a_rank_never_comes(inputs: Path, tmp_path: Path) -> None:
    ((code, log),) = run(inputs, tmp_path / "run", "--timeout", "2", world=1, WORLD_SIZE="2")
    assert (code, log.count("\n")) == (2, 1), log
    assert log.startswith("error: only 1 of 2 ranks came to 127.0.0.1:") and "missing: 1." in log


def test_a_port_that_is_taken(inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ((code, log),) = run(inputs, tmp_path / "run", world=1, MASTER_PORT=port)
    assert (code, log.count("\n")) == (2, 1), log
    assert log.startswith(f"error: MASTER_PORT is {port}, but rank 0 cannot listen on that port: another process")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [b"", b'{"name": "launched", "comm', b"[]", b"null", b"\xff\xfe{", b'{"continued": 3}'],
    ids=["empty", "cut", "list", "null", "bytes", "other"],
)
def test_a_torn_run_json(inputs: Path, tmp_path: Path, text: bytes) -> None:
    if not (whole := inputs / "whole").exists():
        assert run(inputs, whole, *MORE, "phases.1.steps=3", world=1)[0][0] == 0
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "run.json").write_bytes(text)
    ((code, log),) = run(inputs, output, "--resume", str(output), world=1)
    assert (code, log.count("\n")) == (2, 1), log
    assert log.startswith(f"error: {output}/run.json is damaged (") and f"--resume {output} --output NEW" in log
    assert (output / "run.json").read_bytes() == text and not (output / "run.lock").exists()
    if text == b"":
        ((code, log),) = run(inputs, tmp_path / "new", *MORE, "phases.1.steps=4", "--resume", str(output), world=1)
        assert code == 0 and "at step 6 of 7" in log, log


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run", "{tmp}/file/run", "{tmp}/read-only/run"])
def test_a_place_that_cannot_be_written(inputs: Path, tmp_path: Path, small_disk: Any, place: str) -> None:
    (tmp_path / "file").write_text("")
    if "read-only" in place:
        small_disk(tmp_path / "read-only", "64k,ro")
    output = Path(place.format(tmp=tmp_path))
    found = run(inputs, output)
    assert [code for code, _ in found] == [2, 2], found
    assert found[0][1].startswith(f"error: {output} cannot be written: ") and found[0][1].count("\n") == 1, found


@pytest.mark.parametrize("full", ["before", "meanwhile", "checkpoint"])
def test_a_disk_that_is_full(inputs: Path, tmp_path: Path, small_disk: Any, full: str) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, "16k" if full == "before" else "128k" if full == "meanwhile" else "700k")
    every = "checkpoint_every=1000" if full == "meanwhile" else "checkpoint_every=2"
    more = ["keep_checkpoints=50", "phases.1.steps=400", every]
    found = run(inputs, disk / "run", *MORE, *more)
    assert [code for code, _ in found] == [2, 2], found
    log = found[0][1]
    assert "Traceback" not in log and log.splitlines()[-1].startswith("error: "), log
    text = {"checkpoint": "its disk has"}.get(full, f"no room left on the disk of {disk / 'run'}")
    assert text in log.splitlines()[-1], log


@pytest.fixture
def small_disk() -> Iterator[Any]:
    """Mounts a file system of few bytes; skips where this is not allowed."""
    made: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={options}", "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        made.append(folder)

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)
