"""Files written once, past the page cache or through it, and the archives in them."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import random
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert2bert.checkpoints.commit import threads
from bert2bert.files import sink, zip_writer
from bert2bert.files.digest import file_digest
from bert2bert.files.sink import Sink
from bert2bert.files.zip_writer import Zipped

PAGE, FEW, BUFFER = 1 << 12, 1 << 16, 1 << 18
SIZES = [
    1,
    PAGE - 1,
    PAGE,
    FEW - 1,
    FEW,
    FEW + 1,
    BUFFER - 1,
    BUFFER,
    BUFFER + 1,
    2 * BUFFER,
    5 * BUFFER + 3 * PAGE + 7,
]
CONTENT = np.random.default_rng(0).bytes(max(SIZES))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "_BUFFER", BUFFER)
    monkeypatch.setattr(sink, "_spare", [])


def write(path: Path, size: int, step: int, apart: bool) -> Sink:
    with ThreadPoolExecutor(1) as disk, Sink(path, disk if apart else None) as file:
        for at in range(0, size, step):
            assert file.tell() == at
            assert file.write(memoryview(CONTENT)[at : min(at + step, size)]) == min(step, size - at)
    return file


def check(path: Path, size: int, step: int, apart: bool) -> None:
    file = write(path, size, step, apart)
    assert path.read_bytes() == CONTENT[:size]
    assert (file.size, file.digest()) == (size, file_digest(path))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_there(tmp_path: Path, size: int, apart: bool) -> None:
    for step in (random.Random(size).randrange(700, 5000), FEW + 11, BUFFER, 3 * BUFFER + 1):
        check(tmp_path / f"{step}", size, step, apart)
    with Sink(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_file_replaces_what_was_there_and_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    check(tmp_path / "f", PAGE, 100, False)
    (tmp_path / "plain").touch()
    check(tmp_path / "g", PAGE, 100, False)
    assert (tmp_path / "g").stat().st_mode == (tmp_path / "plain").stat().st_mode


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no way past the page cache here")
def test_large_parts_go_past_the_page_cache_and_the_rest_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.write, []

    def watched(fd: int, data: Any) -> int:
        direct = bool(flags(fd) & os.O_DIRECT)
        seen.append((direct, len(data)))
        assert not direct or (len(data) % PAGE == 0 and np.frombuffer(data, np.uint8).ctypes.data % PAGE == 0)
        return real(fd, data)

    monkeypatch.setattr(os, "write", watched)
    check(tmp_path / "f", 2 * BUFFER + FEW + 5, BUFFER, False)
    if not seen[0][0]:
        pytest.skip("this file system goes through the cache")
    assert seen == [(True, BUFFER), (True, BUFFER), (True, FEW), (False, 5)]
    seen.clear()
    check(tmp_path / "g", FEW - 1, 100, False)
    assert seen == [(False, FEW - 1)]


def refusing_flags(fd: int, command: int, *argument: int) -> int:
    if command == fcntl.F_SETFL and argument[0] & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL_FCNTL(fd, command, *argument)


def refusing_writes(fd: int, data: Any) -> int:
    if flags(fd) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL_WRITE(fd, data)


def short_writes(fd: int, data: Any) -> int:
    return REAL_WRITE(fd, memoryview(data)[: min(len(data), PAGE // 2 if flags(fd) & os.O_DIRECT == 0 else PAGE)])


REAL_FCNTL, REAL_WRITE = fcntl.fcntl, os.write


@pytest.mark.parametrize(
    ("place", "name", "behaviour"),
    [(fcntl, "fcntl", refusing_flags), (os, "write", refusing_writes), (os, "write", short_writes)],
    ids=["flag refused", "write refused", "short writes"],
)
@pytest.mark.parametrize("apart", [False, True])
def test_odd_file_systems(
    tmp_path: Path, place: Any, name: str, behaviour: Callable[..., int], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, behaviour)
    for size in SIZES:
        check(tmp_path / f"{size}", size, FEW + 11, apart)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_an_error_is_raised_and_the_file_removed(
    tmp_path: Path, good: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [good]

    def failing(fd: int, data: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return REAL_WRITE(fd, data)

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f", 2 * BUFFER + 5, BUFFER, apart)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_closing_removes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    close = os.close
    with pytest.raises(OSError, match="quota"), Sink(tmp_path / "f") as file:
        file.write(CONTENT[:100])
        monkeypatch.setattr(os, "close", failing)
    assert list(tmp_path.iterdir()) == [] and len(sink._spare) == 1


def test_an_error_of_the_caller_removes_the_file_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Sink(tmp_path / "f") as file:
        file.write(CONTENT[: BUFFER + 1])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_buffers_are_used_again(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}", 4 * BUFFER + 1, FEW, True)
    assert 0 < len(sink._spare) <= 3


RECORDS = {"archive/data.pkl": 100, "archive/data/0": 0, "archive/data/1": 1, "archive/data/2": FEW, "archive/v": 2}


@pytest.mark.parametrize("bound", [(1 << 31) - 1, FEW - 1, 50, 0])
@pytest.mark.parametrize("block", [7, PAGE, 10 * FEW])
def test_the_standard_library_reads_an_archive(bound: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_writer, "_ZIP64", bound)  # offsets and sizes above it take 64 bits
    file = io.BytesIO()
    archive = Zipped(file)
    for name, size in RECORDS.items():
        archive.record(name, size, (CONTENT[at : min(at + block, size)] for at in range(0, size, block)))
    archive.close()
    with zipfile.ZipFile(file) as found:
        assert found.testzip() is None
        assert {info.filename: info.file_size for info in found.infolist()} == RECORDS
        for info in found.infolist():
            assert found.read(info) == CONTENT[: info.file_size]
            assert info.date_time == (1980, 1, 1, 0, 0, 0) and info.external_attr >> 16 == 0o600
            with found.open(info):
                assert file.tell() % zip_writer.ALIGNMENT == 0  # where the data begin


def test_an_archive_of_more_records_than_16_bits_count() -> None:
    file = io.BytesIO()
    archive = Zipped(file)
    for i in range(70_000):
        archive.record(f"{i}", 0, ())
    archive.close()
    with zipfile.ZipFile(file) as found:
        assert len(found.infolist()) == 70_000


@pytest.mark.parametrize("size", [99, 101, FEW])
def test_a_record_of_another_length_is_a_defect(size: int) -> None:
    with pytest.raises(RuntimeError, match=f"announced with {size} bytes and has 100"):
        Zipped(io.BytesIO()).record("archive/x", size, (CONTENT[:100],))


@pytest.mark.parametrize(("row", "files"), [(0, 5), (4096, 5), (1 << 26, 5), (1 << 28, 2), (1 << 29, 1), (1 << 31, 1)])
def test_fewer_files_are_written_at_a_time_where_rows_are_huge(row: int, files: int) -> None:
    assert threads.files_at_once(row) == files
