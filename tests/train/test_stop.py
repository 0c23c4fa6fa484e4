"""Real processes of launch/pretrain.py that are stopped, started twice, and meet links where they write."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.train.launched import ROOT, losses, write_inputs

Start = Callable[..., "Ranks"]
LONG = ["phases.0.steps=2000", "phases.1.steps=2000", "eval_every=4000", "checkpoint_every=4000"]


def hear() -> None:
    """In a new process: SIGHUP counts, also where the tests themselves were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Ranks:
    """The processes of one run, as a launcher starts them. ``head``: what each does before the program's own lines."""

    def __init__(self, recipe: Path, output: Path, world: int, sets: list[str], more: list[str], head: str) -> None:
        self.output, self.log = output, output.with_suffix(f".{time.monotonic_ns()}.log")
        port, options = free_port(), ["--ds_config", "ds_configs/zero2_cpu.json", "--recipe", recipe]
        command = [*options, "--output", output, *more, *(["--set", *sets] if sets else [])]
        start = [sys.executable, "-u", "launch/pretrain.py"]
        if head:
            program = f"{head}\nimport runpy\nrunpy.run_path('launch/pretrain.py', None, '__main__')"
            start = [sys.executable, "-c", program]
        log = self.log.open("w")
        self.processes = []
        for rank in range(world):
            ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, **{name: str(value) for name, value in ours.items()}}
            words = [*start, *map(str, command)]
            self.processes.append(
                subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=hear)
            )

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_text().count('"train"') if path.exists() else 0

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not ready():
            assert all(process.poll() is None for process in self.processes), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> list[int]:
        return [process.wait(100) for process in self.processes]

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def start(recipe: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Ranks] = []

    def begin(*sets: str, world: int = 1, output: str = "run", more: tuple[str, ...] = (), head: str = "") -> Ranks:
        started.append(Ranks(recipe, tmp_path / output, world, list(sets), list(more), head))
        return started[-1]

    yield begin
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


def test_ranks_that_are_stopped_leave_together_and_deaf(start: Start, recipe: Path, tmp_path: Path) -> None:
    """One rank of two gets the signal; as soon as one has left, a launcher ends the others."""
    ranks = start(*LONG, world=2)
    ranks.until(lambda: ranks.steps() >= 2)
    ranks.processes[1].send_signal(signal.SIGUSR1)
    while all(process.poll() is None for process in ranks.processes):
        time.sleep(0.005)
    for process in ranks.processes:
        process.terminate()
    assert ranks.end() == [75, 75], ranks.log.read_text()
    assert len(ranks.lines("stopped by SIGUSR1 after step")) == 1 and not ranks.lines("Traceback")
    step = int((ranks.output / "latest").read_text().removeprefix("global_step"))
    assert not (ranks.output / "run.lock").exists()

    again = start(f"phases.0.steps={step + 1}", "phases.1.steps=1", "eval_every=4000", world=2, more=resume(ranks))
    assert again.end() == [0, 0], again.log.read_text()
    assert [s for kind, s, _ in losses(ranks.output) if kind == "train"] == list(range(1, step + 3))


def resume(ranks: Ranks) -> tuple[str, ...]:
    return ("--resume", str(ranks.output))


HOLD = "import os\nfrom bert2bert.ranks import stopping\nstopping.hold()\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_import_is_held(start: Start, number: signal.Signals) -> None:
    ranks = start(head=f"{HOLD}os.kill(os.getpid(), {int(number)})")
    assert ranks.end() == [75], ranks.log.read_text()
    assert len(ranks.lines(f"stopped by {number.name} before the first step")) == 1 and not ranks.lines("Traceback")
    assert not ranks.output.exists()


def test_ctrl_c_is_one_line_and_a_checkpoint(start: Start) -> None:
    ranks = start(*LONG)
    ranks.until(lambda: ranks.steps() >= 2)
    ranks.processes[0].send_signal(signal.SIGINT)
    assert ranks.end() == [75], ranks.log.read_text()
    assert len(ranks.lines("stopped by SIGINT after step")) == 1 and not ranks.lines("Traceback")
    assert (ranks.output / "latest").exists()


def test_the_third_ctrl_c_ends_what_hangs(start: Start) -> None:
    ranks = start(head=f"{HOLD}import time\nprint('held', flush=True)\ntime.sleep(1000)")
    ranks.until(lambda: bool(ranks.lines("held")))
    for _ in range(3):
        ranks.processes[0].send_signal(signal.SIGINT)
        time.sleep(1.2)  # sooner, it would be the same press, handed on by a launcher
    assert ranks.end() == [130], ranks.log.read_text()
    assert len(ranks.lines("Ctrl-C once more")) == 1 and len(ranks.lines("ended at once by Ctrl-C")) == 1


def test_a_lost_terminal_costs_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["launch/pretrain.py", "--ds_config", "ds_configs/zero2_cpu.json", "--recipe", recipe, "--output", output]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--set", *LONG], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=hear,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + 100
        while not (output / "metrics.jsonl").exists() or '"train"' not in (output / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(100) == 75
    finally:
        process.kill()
        process.wait()
    assert (output / "latest").exists()


def test_one_command_starts_and_goes_on_and_a_second_process_is_refused(start: Start, tmp_path: Path) -> None:
    first = start(*LONG, more=("--resume", str(tmp_path / "run")))
    first.until(lambda: first.steps() >= 1)
    files = [path for path in first.output.iterdir() if path.is_file() and path.name != "metrics.jsonl"]
    before = {path.name: path.read_bytes() for path in files}
    second = start(*LONG, "seed=5", more=resume(first))
    assert second.end() == [2], second.log.read_text()
    error = second.lines("error: ")
    assert error and f"is in use: process {first.processes[0].pid} on {socket.gethostname()}" in error[0]
    assert {name: (first.output / name).read_bytes() for name in before} == before
    first.processes[0].send_signal(signal.SIGTERM)
    assert first.end() == [75] and first.lines("no checkpoint in")

    step = int((first.output / "latest").read_text().removeprefix("global_step"))
    third = start(f"phases.0.steps={step + 1}", "phases.1.steps=1", more=resume(first))
    assert third.end() == [0], third.log.read_text()


def test_nothing_behind_a_link_changes(start: Start, tmp_path: Path) -> None:
    """An archived tag, a run folder and every file in it may be links; only the run folder's is followed."""
    short = ("phases.0.steps=2", "phases.1.steps=2", "checkpoint_every=2", "keep_checkpoints=1")
    assert start(*short, output="first").end() == [0]
    home, archive = tmp_path / "first", tmp_path / "archive"
    home.rename(archive)
    home.mkdir()
    for path in archive.iterdir():
        (home / path.name).symlink_to(path)
    (home / "run.lock").symlink_to(archive / "run.json")
    (home / "latest").unlink()
    (home / "latest").write_text("global_step4")
    os.replace(home / "global_step4", home / "global_step1")  # an old tag that was moved away and linked back
    (home / "global_step4").mkdir()
    for path in (archive / "global_step4").iterdir():
        (home / "global_step4" / path.name).write_bytes(path.read_bytes())
    (home / "global_step6").symlink_to(archive / "global_step4")  # of a timeline that is left here
    (tmp_path / "run").symlink_to(home)

    def everything() -> dict[str, tuple[int, bytes]]:
        files = (path for path in archive.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = everything()
    longer = start(*short, "phases.1.steps=4", more=("--resume", str(tmp_path / "run")))
    assert longer.end() == [0], longer.log.read_text()
    after = everything()
    assert not [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert (home / "global_step1").is_symlink() and not (home / "global_step6").is_symlink()
    assert json.loads((home / "run.json").read_text())["finished"] and (tmp_path / "run").is_symlink()
    assert [step for kind, step, _ in losses(home) if kind == "train"] == [1, 2, 3, 4, 5, 6]
