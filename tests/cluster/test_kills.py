"""A rank is killed at twenty moments of training and saving, and after each the same command goes on: never a wrong
checkpoint, and in the end the losses and the weights of the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.commit.pending import check_complete, check_contents, file_sizes
from bert2bert.checkpoints.manifest import MANIFEST
from tests.cluster.ranks import started
from tests.train.launched import Hook, losses

KILLS = 20
STEPS = 63
SETS = [
    "--set",
    "phases.0.steps=3",
    f"phases.1.steps={STEPS - 3}",
    "checkpoint_every=2",
    "eval_every=63",
    "log_every=1",
]


def kill_after(events: int, victim: int) -> Hook:
    """The victim is killed at its so manieth event: a step that begins, a file that is opened to be written, renamed or
    synced, all of which come some thirty times between two checkpoints."""

    def hook(mine: int) -> None:
        from bert2bert.ranks import launcher

        launcher.GRACE_SECONDS = 0.2  # no launcher ends who is left
        if mine != victim:
            return
        from bert2bert.train import loop

        left = [events]

        def count() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def call(*given: Any, **named: Any) -> Any:
                count()
                result = original(*given, **named)
                count()
                return result

            setattr(owner, name, call)

        import torch

        counted(loop, "Draw")
        for name in ("fsync", "replace", "unlink", "mkdir"):
            counted(os, name)
        counted(torch, "save")

    return hook


@pytest.mark.timeout(400)
def test_the_run_goes_on_after_every_kill(inputs: Path, tmp_path: Path) -> None:
    with started(tmp_path / "logs", inputs, tmp_path / "whole", *SETS) as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
    draw, output, kills = random.Random(7), tmp_path / "run", 0
    began = time.monotonic()
    reached = 0
    while kills < KILLS:
        # Steps that are left are shared among the kills that are left, so that none comes after the end
        room = max((STEPS - reached) // (KILLS - kills + 1), 1)
        hook = kill_after(draw.randint(3, 5 + 12 * room), victim := draw.randint(0, 1))
        with started(tmp_path / "logs", inputs, output, "--resume", "auto", *SETS, hook=hook) as ranks:
            assert ranks.wait(victim, 60) == -signal.SIGKILL, (kills, ranks.log(victim))
            assert ranks.wait(1 - victim, 60) in (2, 0), ranks.log(1 - victim)
            assert "Traceback" not in ranks.log(1 - victim)
            assert "damaged" not in ranks.log(0)
        kills += 1
        for folder in output.glob("global_step*"):
            if (folder / MANIFEST).exists():  # what counts as whole is so
                check_complete(folder)
                check_contents(folder, [MANIFEST, *file_sizes(folder)])
        latest = output / "latest"
        reached = int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0
    print(f"{kills} kills up to step {reached} in {time.monotonic() - began:.0f} s")
    with started(tmp_path / "logs", inputs, output, "--resume", "auto", *SETS) as ranks:
        assert ranks.end() == [0, 0], ranks.log(0)
    assert losses(output) == losses(tmp_path / "whole")
    last = f"global_step{STEPS}"
    files = sorted(file.name for file in (output / last).glob("*optim_states.pt"))
    assert len(files) == 2
    for name in files:
        assert (output / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
