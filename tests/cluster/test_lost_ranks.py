"""A rank that is killed, frozen, cut off or stuck: the others stop in time and say which, and the run goes on later as
if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import cable
from tests.cluster.ranks import started, steps, wait_until
from tests.train.launched import Hook, losses

SETS = ["--set", "phases.0.steps=3", "phases.1.steps=60", "checkpoint_every=10", "eval_every=63", "log_every=1"]
SILENCE = (
    "has given no sign of life for {} s (--timeout): it is frozen, its host is down, or the network between is cut"
)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with started(folder, inputs, folder / "run", *SETS) as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
    return losses(folder / "run")


def at(step: int, rank: int, do: Any) -> Hook:
    """A hook: ``do()`` in the beginning of a 0-based step of a rank."""

    def hook(mine: int) -> None:
        from bert2bert.train import loop

        original = loop.Draw

        def draw(now: int, *rest: Any) -> Any:
            if (mine, now) == (rank, step):
                do()
            return original(now, *rest)

        loop.Draw = draw  # type: ignore[assignment, misc]

    return hook


def goes_on(tmp_path: Path, inputs: Path, undisturbed: list[tuple[str, int, float]]) -> None:
    with started(tmp_path / "again", inputs, tmp_path / "run", "--resume", "auto", *SETS) as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
        assert "resumed from" in ranks.log(0)
    assert losses(tmp_path / "run") == undisturbed


@pytest.mark.timeout(200)
def test_the_link_between_two_nodes_is_cut(
    inputs: Path, tmp_path: Path, nodes: tuple[str, str], undisturbed: list[tuple[str, int, float]]
) -> None:
    where = [{"NETNS": name, "MASTER_ADDR": "10.77.0.1", "LOCAL_RANK": "0"} for name in nodes]
    cut = at(25, 0, lambda: cable(nodes[0], "down"))
    words = ["--resume", "auto", "--timeout", "10", *SETS]
    with started(tmp_path / "first", inputs, tmp_path / "run", *words, environ=where, hook=cut) as ranks:
        wait_until(lambda: steps(tmp_path / "run") >= 25)
        began = time.monotonic()
        assert [ranks.wait(rank, 60) for rank in (0, 1)] == [2, 2], ranks.log(0) + ranks.log(1)
        assert time.monotonic() - began < 30  # 10 s until it is noticed, 5 s for a launcher, the rest for others' load
        for rank in (0, 1):
            last = ranks.log(rank).splitlines()[-1]
            assert f"rank {1 - rank} on " in last and SILENCE.format(10) in last, last
            assert "in step 26 (phase 'full')" in last and last.endswith(f"--resume {tmp_path / 'run'}")
    assert (tmp_path / "run" / "latest").read_text() == "global_step20"
    cable(nodes[0], "up")
    with started(tmp_path / "again", inputs, tmp_path / "run", *words, environ=where) as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
        head = next(line for line in ranks.log(0).splitlines() if line.startswith("network"))
    assert losses(tmp_path / "run") == undisturbed
    assert all(name in head for name in nodes), head  # chosen by itself; this host's name resolves to the loopback


@pytest.mark.timeout(200)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_frozen_and_writes_nothing_when_it_goes_on(
    inputs: Path, tmp_path: Path, undisturbed: list[tuple[str, int, float]], victim: int
) -> None:
    """It is frozen in the middle of a checkpoint, with a file of its own to come."""

    def hook(mine: int) -> None:
        from bert2bert.train import save

        original, saves = save.random_state, count(1)

        def random_state(device: Any) -> Any:
            if mine == victim and next(saves) == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return original(device)

        save.random_state = random_state

    with started(tmp_path / "first", inputs, tmp_path / "run", "--timeout", "6", *SETS, hook=hook) as ranks:
        other = 1 - victim
        assert ranks.wait(other, 60) == 2, ranks.log(other)
        last = ranks.log(other).splitlines()[-1]
        assert f"rank {victim} on " in last and SILENCE.format(6) in last, last
        before = sorted(file.name for file in (tmp_path / "run" / "global_step30").iterdir())
        os.kill(ranks.processes[victim].pid or 0, signal.SIGCONT)
        assert ranks.wait(victim, 30) == 2, ranks.log(victim)
        assert "frozen" in ranks.log(victim), ranks.log(victim)
        assert sorted(file.name for file in (tmp_path / "run" / "global_step30").iterdir()) == before
    assert (tmp_path / "run" / "latest").read_text() == "global_step20"
    goes_on(tmp_path, inputs, undisturbed)


@pytest.mark.parametrize(("victim", "stage"), [(0, 2), (1, 3)])
def test_a_rank_is_killed(inputs: Path, tmp_path: Path, victim: int, stage: int) -> None:
    """Three ranks: who is lost is named to those who talk to others, too."""
    kill = at(12, victim, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sets = [*SETS, "global_batch_size=96"]
    with started(tmp_path, inputs, tmp_path / "run", *sets, world=3, stage=stage, hook=kill) as ranks:
        assert ranks.wait(victim, 60) == -signal.SIGKILL
        began = time.monotonic()
        for rank in {0, 1, 2} - {victim}:
            assert ranks.wait(rank, 60) == 2, ranks.log(rank)
            last = ranks.log(rank).splitlines()[-1]
            assert f"rank {victim} on " in last and "has ended without a word: it was killed" in last, last
            assert "Traceback" not in ranks.log(rank)
        assert time.monotonic() - began < 20  # 10 s by itself; others use this machine, too


def test_a_rank_that_cannot_come_out_is_ended(inputs: Path, tmp_path: Path) -> None:
    """As in a collective on a GPU: the main thread waits where no error reaches it."""

    def hook(mine: int) -> None:
        at(12, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))(mine)
        at(12, 0, lambda: time.sleep(300))(mine)

    with started(tmp_path, inputs, tmp_path / "run", *SETS, hook=hook) as ranks:
        assert ranks.wait(0, 60) == 2, ranks.log(0)
        last = ranks.log(0).splitlines()[-1]
        assert last.startswith("error: rank 1 on ") and "has ended without a word" in last
    assert '"how": "failed"' in (tmp_path / "run" / "run.json").read_text()


def test_a_rank_hangs(inputs: Path, tmp_path: Path) -> None:
    """It lives, but does not come: where it is instead."""
    hook = at(12, 1, lambda: time.sleep(300))
    with started(tmp_path, inputs, tmp_path / "run", "--timeout", "6", *SETS, hook=hook) as ranks:
        assert ranks.wait(0, 60) == 2, ranks.log(0)
        last = ranks.log(0).splitlines()[-1]
        assert "all ranks give signs of life, so one of them hangs; this one waits at " in last
        assert "rank 1 on " in last and "at train/loop.py:" in last and "_drawn" in last, last
        assert ranks.wait(1, 30) == 2, ranks.log(1)
        assert "error on rank 1: rank 0 on " in ranks.log(1) and "has failed: rank 0 waited for" in ranks.log(1)
