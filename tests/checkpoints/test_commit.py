"""Nothing half-written is ever taken for a checkpoint: kills at every moment, refusals, full disks."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.commit import journal, pending
from bert2bert.checkpoints.commit.pending import Pending, check_complete, file_sizes, set_latest
from bert2bert.checkpoints.hub.reader import HubSource
from bert2bert.checkpoints.inspect import check
from bert2bert.checkpoints.job import check_folder
from bert2bert.checkpoints.manifest import Manifest, read_manifest, write_manifest
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.target import Target
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.files import lock
from bert2bert.files.sink import Sink
from tests.checkpoints.targets import make_tensors, plain_spec, reader
from tests.doors import write_checkpoint

FORMS: list[dict[str, Any]] = [
    {"format": "zero", "stage": 2, "world_size": 2}, {"format": "universal"}, {"format": "hub"}
]  # fmt: skip


def write(target: Path, how: dict[str, Any], values: Callable[..., torch.Tensor] | None = None) -> Path:
    spec = plain_spec()
    return write_checkpoint(target, spec, values or reader(make_tensors(spec)), manifest_growth=None, **how)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def forked(work: Callable[[], Any]) -> Iterator[int]:
    """A process that does the work; killed at the end if it still runs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.fixture
def half_way(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """A real process stopped in the middle of writing to ``tmp_path / 'd'``."""
    values, count = reader(make_tensors(plain_spec())), [0]
    reading, writing = os.pipe()

    def slow(*request: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == 4:
            os.write(writing, b"half way")
            time.sleep(60)
        return values(*request)

    with forked(lambda: write(tmp_path / "d", request.param, slow)) as child:
        os.close(writing)
        assert os.read(reading, 100) == b"half way"
        yield tmp_path / "d", request.param, child
    os.close(reading)


@pytest.mark.parametrize("half_way", FORMS, indirect=True, ids=lambda how: how["format"])
def test_a_killed_writer_leaves_nothing_complete_and_a_rerun_finishes(
    half_way: tuple[Path, dict[str, Any], int], tmp_path: Path
) -> None:
    target, how, child = half_way
    with pytest.raises(InvalidConfig, match=f"in use: process {child} on "):  # it still lives
        write(target, how)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [p.name for p in tmp_path.rglob("*")]
    assert any(name.endswith(".partial") for name in left)
    assert not {"latest", "latest_universal", "bert2bert.json"} & set(left)
    final = write(target, how)
    check_complete(final)
    write(tmp_path / "clean", how)
    assert tree(target) == tree(tmp_path / "clean")
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".partial", ".lock")]


@pytest.mark.parametrize(
    ("how", "moment"),
    [(FORMS[0], "rename"), (FORMS[0], "latest"), (FORMS[1], "latest_universal"), (FORMS[1], "latest")],
    ids=str,
)
def test_a_writer_killed_at_the_very_end_is_finished_by_a_rerun(
    tmp_path: Path, how: dict[str, Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_at_pointer(root: Path, tag: str, name: str, scratch: Path) -> None:
        if name == moment:
            os._exit(9)
        set_latest(root, tag, name, scratch)

    def work() -> None:
        monkeypatch.setattr(pending, "set_latest", die_at_pointer)
        if moment == "rename":
            monkeypatch.setattr(os, "rename", lambda *_: os._exit(9))
        write(tmp_path / "d", how)

    with forked(work) as child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "d" / "latest").exists()
    final = write(tmp_path / "d", how)
    assert (tmp_path / "d" / "latest").read_text() == final.name
    write(tmp_path / "clean", how)
    assert tree(tmp_path / "d") == tree(tmp_path / "clean")


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_a_second_growth_into_a_finished_folder_is_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    write(tmp_path / "d", how)
    before = tree(tmp_path)
    for other in FORMS:
        with pytest.raises(InvalidConfig, match="already holds a checkpoint"):
            write(tmp_path / "d", other)
        with pytest.raises(InvalidConfig, match="already holds a checkpoint"):
            check_folder(tmp_path / "d", plain_spec(), Target(**other))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("remains", [("job.json", "lock"), ("lock",), ()], ids=str)
@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_what_a_finished_writer_could_not_remove_is_removed(
    tmp_path: Path, how: dict[str, Any], remains: tuple[str, ...]
) -> None:
    """It was killed after the last pointer, while it tidied up, and the next run is perhaps of another command."""
    dead = json.dumps(lock.me() | {"began": "0"})  # else the lock's holder may live elsewhere, and is waited for
    final = write(tmp_path / "d", how)
    before = tree(tmp_path)
    partial = final.with_name(final.name + ".partial")
    partial.mkdir()
    for name in remains:
        (partial / name).write_text('{"of": "another command"}' if name == "job.json" else dead)
    with pytest.raises(InvalidConfig, match="already holds a checkpoint"):
        write(tmp_path / "d", how)
    assert tree(tmp_path) == before and not partial.exists()


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
@pytest.mark.parametrize(
    "name",
    ["latest", "model.safetensors", "pytorch_model.bin", "global_step3/mp_rank_00_model_states.pt", "global_step7/x"],
)
def test_other_peoples_checkpoints_are_left_alone(tmp_path: Path, how: dict[str, Any], name: str) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InvalidConfig, match="already holds"):
        write(tmp_path / "d", how)
    assert tree(tmp_path) == {f"d/{name}": b"mine"}


def test_a_tag_of_a_training_run_without_latest_is_not_an_abandoned_growth(tmp_path: Path) -> None:
    final = write(tmp_path / "d", FORMS[0])
    write_manifest(final, replace(check_complete(final), kind="train"))
    (tmp_path / "d" / "latest").unlink()
    with pytest.raises(InvalidConfig, match="already holds"):
        write(tmp_path / "d", FORMS[0])
    check_complete(final)


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # Lustre without -o flock

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    check_complete(write(tmp_path / "d", FORMS[0]))


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_an_empty_folder_is_a_fine_target(tmp_path: Path, how: dict[str, Any]) -> None:
    (tmp_path / "d").mkdir()
    check_complete(write(tmp_path / "d", how))


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_a_target_may_be_a_link_to_a_folder(tmp_path: Path, how: dict[str, Any]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").symlink_to("disk")
    write(tmp_path / "d", how)
    assert (tmp_path / "d").is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["d", "disk"]
    check_complete(open_source(tmp_path / "disk").folder)
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(InvalidConfig, match="a link that leads nowhere"):
        write(tmp_path / "nowhere", how)


@pytest.mark.parametrize("place", ["partial", "tag", "files", "folder in files", "file in files", "job", "journal"])
def test_nothing_behind_a_link_is_written_or_deleted(tmp_path: Path, place: str) -> None:
    """A killed growth's partial folder, and the tag, with a link to a folder of the user's in every place."""
    archive, target, how = tmp_path / "archive", tmp_path / "d", FORMS[1]
    archive.mkdir()
    for name in ("mp_rank_00_model_states.pt", "job.json", "notes"):
        (archive / name).write_text("precious")
    partial = target / "global_step7.partial"
    files = partial / "files.partial"
    (files / "zero").mkdir(parents=True)
    (partial / "job.json").write_text("{}")
    led = {
        "partial": (partial, archive), "tag": (target / "global_step7", archive), "files": (files, archive),
        "folder in files": (files / "zero" / "bert.embeddings.word_embeddings.weight", archive),
        "file in files": (files / "mp_rank_00_model_states.pt", archive / "mp_rank_00_model_states.pt"),
        "job": (partial / "job.json", archive / "job.json"),
        "journal": (partial / "finished.0.jsonl", archive / "notes"),
    }  # fmt: skip
    link, to = led[place]
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(to)
    if place in ("partial", "tag"):
        with pytest.raises(InvalidConfig, match="is a link, and nothing" if place == "partial" else "already holds"):
            write(target, how)
        assert link.is_symlink()
    else:
        check_complete(write(target, how))
    assert tree(archive) == dict.fromkeys(("mp_rank_00_model_states.pt", "job.json", "notes"), b"precious")


def test_a_run_in_the_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.lock").write_text("")
    with pytest.raises(InvalidConfig, match=r"already holds .*\(run\.lock\)"):
        write(tmp_path / "d", FORMS[0])


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_folders_above_the_target_are_made(tmp_path: Path, how: dict[str, Any]) -> None:
    check_complete(write(tmp_path / "runs" / "today" / "d", how))


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidConfig, match=r"file, above the target .*d, is not a folder"):
        write(tmp_path / "file" / "runs" / "d", how)
    with pytest.raises(InvalidConfig, match="is not a folder"):
        write(tmp_path / "file", how)
    with pytest.raises(InvalidConfig, match="cannot be written"):
        write(Path("/sys/bert2bert"), how)
    assert tree(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize(("place", "call"), [(journal, "fsync_file"), (Sink, "write")], ids=["sync", "write"])
def test_a_disk_that_fails_in_the_middle(
    tmp_path: Path, how: dict[str, Any], failure: int, place: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = itertools.count(1), getattr(place, call)

    def failing(*given: Any) -> Any:
        if next(calls) >= 2:
            raise OSError(failure, os.strerror(failure))
        return real(*given)

    monkeypatch.setattr(place, call, failing)
    expected = InvalidConfig if failure == errno.EROFS else UserError
    text = "no room left on the disk" if failure in (errno.ENOSPC, errno.EDQUOT) else "cannot be written"
    with pytest.raises(expected, match=text):
        write(tmp_path / "runs" / "d", how)  # there is no folder runs either
    assert list(tmp_path.iterdir()) == []  # nothing says what the values are, so no run could go on


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error", "a.pt"), ZeroDivisionError()], ids=str)
def test_a_source_that_fails_in_the_middle(tmp_path: Path, how: dict[str, Any], failure: Exception) -> None:
    values, count = reader(make_tensors(plain_spec())), [0]

    def failing(*request: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == 5:
            raise failure
        return values(*request)

    with pytest.raises(InvalidCheckpoint if isinstance(failure, OSError) else ZeroDivisionError) as raised:
        write(tmp_path / "d", how, failing)
    assert not isinstance(failure, OSError) or "cannot be read: Input/output error (a.pt)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", FORMS, ids=lambda how: how["format"])
def test_room_is_looked_for_before_anything_is_written(
    tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_000))

    def untouched(*request: Any) -> torch.Tensor:
        raise AssertionError("values were asked for")

    with pytest.raises(UserError, match=r"needs .* GB and its disk has 0.00 GB free"):
        write(tmp_path / "d", how, untouched)
    assert list(tmp_path.iterdir()) == []


def test_check_complete_finds_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pt").write_bytes(b"12345")
    with pytest.raises(InvalidCheckpoint, match=r"has no bert2bert\.json"):
        check_complete(tmp_path)
    manifest = Manifest(kind="train", format="zero", files=file_sizes(tmp_path))
    write_manifest(tmp_path, manifest)
    found = json.loads((tmp_path / "bert2bert.json").read_text())
    assert check_complete(tmp_path) == manifest == Manifest(kind="train", format="zero", files={"a/b.pt": 5})
    assert Manifest.from_json(found).intact and not Manifest.from_json({**found, "kind": "growth"}).intact
    (tmp_path / "a" / "b.pt").write_bytes(b"1234")
    with pytest.raises(InvalidCheckpoint, match=r"b\.pt: 4 bytes long, the manifest says 5"):
        check_complete(tmp_path)
    (tmp_path / "a" / "b.pt").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"a/b\.pt: missing, the manifest says 5"):
        check_complete(tmp_path)
    for text, message in {
        "{": "not readable as JSON",
        "[]": "a JSON list, expected an object",
        "{}": "format version None",
        '{"format_version": 1}': "is not a manifest of this project: no 'files'",
        '{"format_version": 1, "files": 3}': "is not a manifest of this project: files is 3, expected a table",
    }.items():
        (tmp_path / "bert2bert.json").write_text(text)
        with pytest.raises(InvalidCheckpoint, match=message):
            check_complete(tmp_path)


def test_latest_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_latest(tmp_path, "global_step1")
    set_latest(tmp_path, "global_step1", "latest_universal")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        set_latest(tmp_path, "global_step2")
    assert tree(tmp_path) == {"latest": b"global_step1", "latest_universal": b"global_step1"}


def test_a_rank_that_outlives_rank_zero_keeps_others_out(tmp_path: Path) -> None:
    def another() -> Pending:
        return Pending(tmp_path / "d", "global_step7")

    def begin(pipe: Any) -> None:
        first.begin({"plan": "1"}, 0, messages.append)
        pipe.send(True)
        time.sleep(60)

    first, second, third, messages = another(), another(), another(), list[str]()
    near, far = multiprocessing.get_context("fork").Pipe()
    rank_zero = multiprocessing.get_context("fork").Process(target=begin, args=(far,), daemon=True)
    rank_zero.start()
    assert near.recv()
    second.join()
    rank_zero.kill()
    rank_zero.join()
    with pytest.raises(InvalidConfig, match=f"in use: process {rank_zero.pid} on "):
        third.begin({"plan": "1"}, 0, messages.append)
    (first.files / "a").write_text("kept")
    second.close()
    assert not third.begin({"plan": "1"}, 0, messages.append) and (third.files / "a").exists()
    assert len(messages) == 1 and f"taken over from process {rank_zero.pid}" in messages.pop()
    third.close()
    fourth = another()
    assert not fourth.begin({"plan": "2"}, 0, messages.append) and not (third.files / "a").exists()
    assert messages == [f"discarded {fourth.partial}: made with another plan"]
    (fourth.files / "a").write_text("of nobody")
    (fourth.partial / "job.json").unlink()
    fourth.close()
    fifth = another()
    assert not fifth.begin({"plan": "2"}, 0, messages.append) and not (fifth.files / "a").exists()
    assert messages[1:] == [f"discarded {fifth.partial}: of another run"]
    (fifth.partial / "job.json").unlink()  # killed between its first two steps: there is nothing to lose
    fifth.close()
    sixth = another()
    assert not sixth.begin({"plan": "2"}, 0, messages.append) and len(messages) == 2
    sixth.close()


def test_permissions_follow_the_umask_and_no_file_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for mask, file, folder in ((0o027, 0o640, 0o750), (0o002, 0o664, 0o775)):
        before = os.umask(mask)
        try:
            for how in FORMS:
                write(tmp_path / f"{how['format']}{mask}", how)
        finally:
            os.umask(before)
        paths = [p for how in FORMS for p in (tmp_path / f"{how['format']}{mask}").rglob("*")]
        assert {p.stat().st_mode & 0o777 for p in paths if p.is_file()} == {file}
        assert {p.stat().st_mode & 0o777 for p in paths if p.is_dir()} == {folder}
    assert not list((tmp_path / "tmp").iterdir()) and len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "link", "folder/outside", "", "a\0b"]
)
def test_names_cannot_leave_their_folder(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "outside").write_text("12345")
    (home / "model.safetensors").touch()
    (home / "link").symlink_to("../outside")
    (home / "folder").symlink_to(tmp_path)
    (home / "bert2bert.json").write_text(json.dumps({"format_version": 1, "files": {name: 5}}))
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    for read in (check_complete, read_manifest, check):
        with pytest.raises(InvalidCheckpoint, match=r"not opened|cannot be followed"):
            read(home)
    (home / "model.safetensors").unlink()
    # a user's links to large files elsewhere are followed for reading; a name that climbs is not
    refused = "not readable as safetensors" if name in ("link", "folder/outside") else "not opened"
    with pytest.raises(InvalidCheckpoint, match=refused):
        HubSource(home, home, None)
    (home / "latest").write_text(name)
    with pytest.raises(InvalidCheckpoint):
        open_source(home)


def test_links_inside_the_folder_and_in_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "f00d").write_text("12345")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "again").symlink_to("model.safetensors")
    write_manifest(snapshot, Manifest(kind="growth", format="hub", files={"model.safetensors": 5, "again": 5}))
    check_complete(snapshot)


def test_odd_names_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"123")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "file")
    assert file_sizes(tmp_path) == {"a/b/file": 3, "link": 3} and file_sizes(tmp_path / "nowhere") == {}
