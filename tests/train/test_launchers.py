"""The same two-rank run through the true deepspeed, torchrun and mpirun: the same losses, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.train.launched import ROOT, losses, write_inputs

LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "{port}"],
    "mpirun": ["mpirun", "--oversubscribe", "-n", "2", sys.executable],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def launch(launcher: str, recipe: Path, output: Path) -> list[tuple[str, int, float]]:
    command = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    options = ["--ds_config", "ds_configs/zero2_cpu.json", "--recipe", recipe, "--output", output]
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*command, "launch/pretrain.py", *map(str, options)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    described = json.loads((output / "run.json").read_text())
    assert described["world_size"] == 2 and described["finished"]
    assert described["command"][0] == "launch/pretrain.py" and str(recipe) in described["command"]
    return losses(output)


def test_every_launcher_trains_the_same(tmp_path: Path, recipe: Path) -> None:
    missing = [name for name in LAUNCHERS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}")
    found = {name: launch(name, recipe, tmp_path / name) for name in LAUNCHERS}
    steps = [
        ("eval", 0),
        *(("train", s) for s in (1, 2, 3)),
        ("eval", 3),
        *(("train", s) for s in (4, 5, 6)),
        ("eval", 6),
    ]
    assert [(kind, step) for kind, step, _ in found["torchrun"]] == steps
    assert found["mpirun"] == found["torchrun"]
    assert found["deepspeed"] == found["torchrun"]


@pytest.mark.skipif(shutil.which("deepspeed") is None, reason="deepspeed is not on PATH")
def test_ranks_whose_launcher_was_killed_write_a_checkpoint_and_leave(tmp_path: Path, recipe: Path) -> None:
    """`deepspeed` alone is killed; the process that it started, and the ranks, live on without it."""
    output, log = tmp_path / "run", (tmp_path / "log").open("w")
    command = [word.format(port=free_port()) for word in LAUNCHERS["deepspeed"]]
    options = ["--ds_config", "ds_configs/zero2_cpu.json", "--recipe", recipe, "--output", output, "--set"]
    sets = ["phases.0.steps=2000", "phases.1.steps=2000", "eval_every=4000", "checkpoint_every=4000"]
    words = [*command, "launch/pretrain.py", *map(str, options), *sets]
    process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) > 2, process, tmp_path / "log")
        process.kill()
        process.wait()
        wait(lambda: (output / "latest").exists(), None, tmp_path / "log")
        wait(lambda: not running(str(output)), None, tmp_path / "log")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert "the launcher is gone; stopping" in text and "stopped by SIGTERM after step" in text


def wait(ready: Callable[[], bool], process: subprocess.Popen | None, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process is None or process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def running(word: str) -> list[int]:
    """Processes that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found
