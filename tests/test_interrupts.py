"""Commands that a signal ends: one line, the status that shells know, and growth goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.killing import make_source

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The words of a growth into so many files that it is met on its way."""
    home = tmp_path_factory.mktemp("source")
    make_source(home)

    def words(target: Path) -> list[str]:
        how = "--width aki --lossy --no-measure --format zero --stage 2 --world-size 400"
        return ["grow", str(home / "small"), str(target), "--config", str(home / "big.json"), *how.split()]

    return words


def interrupted(command: list[str], until: Callable[[], bool], number: signal.Signals) -> tuple[int, list[str]]:
    """Status and lines of a command whose process group gets a signal, as from a terminal."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not until():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out.splitlines()


@pytest.mark.parametrize(
    ("start", "workers", "number", "status", "text"),
    [
        (["-m", "bert2bert"], "1", signal.SIGINT, 130, "interrupted"),
        (["-m", "bert2bert"], "2", signal.SIGTERM, 143, "ended by SIGTERM"),
        (["launch/grow.py"], "1", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_an_interrupted_growth_says_so_and_goes_on(
    growth: Callable[[Path], list[str]], tmp_path: Path, start: list[str], workers: str, number: signal.Signals,
    status: int, text: str,
) -> None:  # fmt: skip
    words = [*growth(tmp_path / "grown"), "--workers", workers]

    def met() -> bool:
        return any(path.stat().st_size for path in tmp_path.glob("grown/*.partial/finished.*.jsonl"))

    found, lines = interrupted([*start, *words[start == ["launch/grow.py"] :]], met, number)
    assert found == status and lines[-1] == f"bert2bert grow: {text}; the same command goes on"
    assert not [line for line in lines if "Traceback" in line or "kept " in line]
    if number == signal.SIGTERM:
        done = subprocess.run([sys.executable, "-m", "bert2bert", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "resumed  " in done.stdout and (tmp_path / "grown" / "latest").exists()


def test_an_interrupted_command_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the whale swims in the deep sea\n\n" * 200_000)
    words = [
        "prepare",
        "--text",
        str(tmp_path / "text"),
        "--document",
        "blank-line",
        "--vocab-size",
        "64",
        "--output",
        str(tmp_path / "bins"),
    ]
    found, lines = interrupted(["-m", "bert2bert", *words], (tmp_path / "bins.partial").exists, signal.SIGINT)
    assert found == 130 and lines[-1] == "bert2bert prepare: interrupted" and "Traceback" not in "".join(lines)
    assert os.listdir(tmp_path) == ["text"]
