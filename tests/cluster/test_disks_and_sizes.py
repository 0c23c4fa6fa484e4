"""Other numbers of ranks after a restart, two jobs in one folder, damaged checkpoints, bad disks, other clocks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bert2bert.report.status import status
from tests.cluster.ranks import root, started, steps, wait_until
from tests.cluster.test_lost_ranks import SETS, at
from tests.train.launched import Hook, losses, write_configs

WIDE = [*SETS, "global_batch_size=96", "phases.1.steps=21", "eval_every=24", "checkpoint_every=6"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    root("mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def run(tmp_path: Path, inputs: Path, output: Path, *more: str, codes: tuple[int, ...] = (0, 0), **how: Any) -> str:
    """The log of rank 0 of a job of as many ranks as there are ``codes``."""
    with started(tmp_path / "logs", inputs, output, "--resume", "auto", *more, world=len(codes), **how) as ranks:
        assert ranks.end() == list(codes), [ranks.log(rank) for rank in range(len(codes))]
        return ranks.log(0)


def stop(step: int) -> Hook:
    """SIGTERM to rank 0 in a 0-based step: the run stops behind it, with a checkpoint."""
    return at(step, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_two_ranks_three_and_one_go_on_with_the_same_batch(inputs: Path, tmp_path: Path) -> None:
    sets = [*WIDE, "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0"]  # drawn on each rank
    small = tmp_path / "inputs"
    shutil.copytree(inputs, small)
    write_configs(small, micro=16)
    output = tmp_path / "run"
    log = run(tmp_path, small, output, *sets, hook=stop(8), codes=(75, 75))
    assert "3 accumulated x 2 ranks = 96 rows" in log, log
    log = run(tmp_path, small, output, *sets, hook=stop(15), codes=(75, 75, 75))
    assert "2 accumulated x 3 ranks = 96 rows" in log and "at step 9 of 24" in log, log
    log = run(tmp_path, small, output, *sets, codes=(0,))
    assert "6 accumulated x 1 rank = 96 rows" in log and "at step 16 of 24" in log, log
    run(tmp_path, small, tmp_path / "whole", *sets)
    found, wanted = losses(output), losses(tmp_path / "whole")
    assert [record[:2] for record in found] == [record[:2] for record in wanted]
    for (_, _, one), (_, _, other) in zip(found, wanted, strict=True):
        assert abs(one - other) <= 1e-5 * abs(other)  # sums over ranks are rounded in another order
    log = run(tmp_path, small, output, *sets, codes=(2, 2, 2, 2))
    assert "run on 1, 2, 3 or 6 ranks with train_micro_batch_size_per_gpu 16" in log, log


def test_two_jobs_in_one_folder(inputs: Path, tmp_path: Path) -> None:
    """The second is refused at once, whatever its clock says, and the first does not notice."""

    def later(mine: int) -> None:
        hour = time.time
        time.time = lambda: hour() + 3600

    output = tmp_path / "run"
    with started(tmp_path / "first", inputs, output, *SETS) as ranks:
        wait_until(lambda: steps(output) > 3)
        log = run(tmp_path, inputs, output, *SETS, codes=(2, 2), hook=later)
        assert "is in use: process" in log and "Traceback" not in log, log
        assert ranks.end() == [0, 0], ranks.log(0)


def test_a_node_whose_clock_is_an_hour_off(inputs: Path, tmp_path: Path) -> None:
    """Rank 0's clock is early, rank 1's late: the run trains, and its state is not misread."""

    def skewed(mine: int) -> None:
        hour = time.time
        time.time = lambda: hour() + (3600 if mine else -3600)

    seen: list[str] = []
    output = tmp_path / "run"
    with started(tmp_path / "logs", inputs, output, *SETS, hook=skewed) as ranks:
        wait_until(lambda: steps(output) > 3)
        seen.append(status(output).state)
        assert ranks.end() == [0, 0], ranks.log(0)
    assert [*seen, status(output).state] == ["running", "finished"]


def test_a_damaged_newest_checkpoint_is_passed_over(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(tmp_path, inputs, output, *SETS, hook=stop(24), codes=(75, 75))
    file = next((output / "global_step25").glob("*rank_1*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    log = run(tmp_path, inputs, output, *SETS)
    assert "passed over a damaged checkpoint" in log and "at step 20 of 63" in log, log
    run(tmp_path, inputs, tmp_path / "whole", *SETS)
    assert losses(output) == losses(tmp_path / "whole")


def test_a_disk_that_fills_up_read_only_and_slow(inputs: Path, tmp_path: Path, disk: Path) -> None:
    """Full: status 2 and the older checkpoint in force; read-only: refused; slow: it only takes longer."""

    def slow(mine: int) -> None:
        sync = os.fsync
        os.fsync = lambda fd: (time.sleep(0.2), sync(fd))[1]

    output = disk / "run"
    filler = disk / "filler"
    log = run(tmp_path, inputs, output, *SETS, hook=stop(12), codes=(75, 75))
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(max(free - 200_000, 0)))
    log = run(tmp_path, inputs, output, *SETS, codes=(2, 2))
    assert "its disk has" in log.splitlines()[-1] and "Traceback" not in log, log
    root("mount", "-o", "remount,ro", str(disk))
    log = run(tmp_path, inputs, output, *SETS, codes=(2, 2))
    assert "cannot be written" in log and "Traceback" not in log, log
    root("mount", "-o", "remount,rw", str(disk))
    filler.unlink()
    assert "at step 13 of 63" in run(tmp_path, inputs, output, *SETS, "checkpoint_every=50", hook=slow)
    assert status(output).state == "finished"
