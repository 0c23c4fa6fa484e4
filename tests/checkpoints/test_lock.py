"""A folder's lock between real processes: refused while its holder lives, wherever that is; taken over after that."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.files import lock
from bert2bert.files.lock import Lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT": 0.1, "SILENT": 1.0, "POLL": 0.05, "PATIENCE": 0.2, "SETTLE": 0.3}.items():
        monkeypatch.setattr(lock, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def hold(path: Path, pipe: Any) -> None:
    held = Lock(path)
    held.acquire(lambda text: None)
    pipe.send(os.getpid())
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Starts a process, in Slurm job 77, that holds ``tmp_path/run/lock``."""
    started = []

    def start() -> Any:
        near, far = FORK.Pipe()
        with monkeypatch.context() as job:
            job.setenv("SLURM_JOB_ID", "77")
            process = FORK.Process(target=hold, args=(tmp_path / "run" / "lock", far), daemon=True)
            process.start()
        started.append(process)
        assert near.recv() == process.pid
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def elsewhere(path: Path, **other: Any) -> dict[str, Any]:
    """The lock of a process on another host."""
    content = {**lock.me(), "host": "node7", "pid": 4711, "boot": "another", "token": "x", **other}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("kernel", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize("frozen", [False, True], ids=["running", "stopped"])
def test_the_second_names_the_first_and_changes_nothing(
    tmp_path: Path, holder: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, kernel: bool, frozen: bool
) -> None:
    if not kernel:
        no_locks(monkeypatch)
    first, path = holder(), tmp_path / "run" / "lock"
    if frozen:
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(0.3)
    before = path.read_bytes()
    with pytest.raises(InvalidConfig) as refused:
        Lock(path).acquire(lambda text: None)
    words = rf"{tmp_path}/run is in use: process {first.pid} on {socket.gethostname()} \(Slurm job 77, since 20\d\d-"
    assert re.match(words, str(refused.value))
    assert path.read_bytes() == before and os.listdir(path.parent) == ["lock"]


@pytest.mark.parametrize("kernel", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_process_of_this_host_is_followed_at_once(
    tmp_path: Path, holder: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, kernel: bool, reaped: bool
) -> None:
    monkeypatch.setattr(lock, "SILENT", 1000.0)
    if not kernel:
        no_locks(monkeypatch)
    first, messages = holder(), list[str]()
    os.kill(first.pid, signal.SIGKILL)
    if reaped:
        first.join()
    else:
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    second = Lock(tmp_path / "run" / "lock")
    second.acquire(messages.append)
    assert len(messages) == 1 and f"taken over from process {first.pid} on" in messages[0]
    second.close()
    assert os.listdir(tmp_path / "run") == []  # the folder was the first's


def test_a_number_that_means_another_process_now_is_no_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    path = tmp_path / "lock"
    path.write_text(json.dumps({**lock.me(), "began": "1"}))
    taken = Lock(path)
    taken.acquire(lambda text: None)
    taken.close()
    path.write_text(json.dumps(lock.me()))
    with pytest.raises(InvalidConfig, match=f"process {os.getpid()} on"):
        Lock(path).acquire(lambda text: None)


@pytest.mark.parametrize("kernel", [True, False], ids=["flock", "no flock"])
def test_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    """Not by the clock: the other's may differ by hours."""
    if not kernel:
        no_locks(monkeypatch)
    path, messages, over = tmp_path / "lock", list[str](), threading.Event()
    elsewhere(path)

    def renew() -> None:
        at = 1_000_000_000
        while not over.wait(0.3):
            os.utime(path, (at := at + 1, at))

    renewing = threading.Thread(target=renew)
    renewing.start()
    with pytest.raises(InvalidConfig, match="process 4711 on node7"):
        Lock(path).acquire(messages.append)
    over.set()
    renewing.join()
    os.utime(path, (4_000_000_000, 4_000_000_000))
    taken = Lock(path)
    taken.acquire(messages.append)
    assert [text.split(":")[0] for text in messages[-2:]] == ["waiting", str(tmp_path)] and str(path) in messages[-2]
    assert json.loads(path.read_text())["pid"] == os.getpid()
    taken.close()


def test_a_requeued_job_follows_its_own_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENT", 1000.0)
    elsewhere(tmp_path / "lock", job="Slurm job 12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    taken = Lock(tmp_path / "lock")
    taken.acquire(lambda text: None)
    assert json.loads((tmp_path / "lock").read_text())["job"] == "Slurm job 12"
    taken.close()


def test_who_lost_the_lock_notices_and_leaves_it_alone(tmp_path: Path) -> None:
    first = Lock(tmp_path / "run" / "lock")
    first.acquire(lambda text: None)
    first.check()
    deadline = time.monotonic() + 20
    before = (tmp_path / "run" / "lock").stat().st_mtime_ns
    while (tmp_path / "run" / "lock").stat().st_mtime_ns == before:  # it is renewed
        assert time.monotonic() < deadline
        time.sleep(0.02)
    content = elsewhere(first.path)
    with pytest.raises(UserError, match=r"process 4711 on node7 .* has taken over"):
        first.check()
    while not first.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.close()
    assert json.loads(first.path.read_text()) == content
    second = Lock(tmp_path / "again" / "lock")
    second.acquire(lambda text: None)
    second.path.unlink()
    with pytest.raises(UserError, match="somebody deleted lock of"):
        second.check()
    second.close()


def test_no_link_is_followed_and_no_folder_left(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    taken = Lock(tmp_path / "run" / "lock")
    taken.acquire(lambda text: None)
    taken.close()
    new = Lock(tmp_path / "a" / "b" / "lock")
    new.acquire(lambda text: None)
    new.close()
    assert (tmp_path / "precious").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["precious", "run"] and not os.listdir(tmp_path / "run")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(lock.os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            Lock(tmp_path / "a" / "lock").acquire(lambda text: None)
    assert not os.listdir(tmp_path)


def race(path: Path, start: Any, results: Any) -> None:
    start.wait()
    try:
        Lock(path).acquire(lambda text: None)
        results.put("taken")
    except InvalidConfig:
        results.put("refused")
    time.sleep(60)


@pytest.mark.parametrize("kernel", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize("stale", [True, False], ids=["over a dead one's", "first"])
def test_of_many_at_once_one_has_it(
    tmp_path: Path, holder: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, kernel: bool, stale: bool
) -> None:
    if not kernel:
        no_locks(monkeypatch)
    if stale:
        first = holder()
        first.kill()
        first.join()
    start, results = FORK.Barrier(6), FORK.Queue()
    rivals = [
        FORK.Process(target=race, args=(tmp_path / "run" / "lock", start, results), daemon=True) for _ in range(6)
    ]
    for rival in rivals:
        rival.start()
    try:
        assert sorted(results.get(timeout=60) for _ in rivals) == ["refused"] * 5 + ["taken"]
    finally:
        for rival in rivals:
            rival.kill()
            rival.join()
