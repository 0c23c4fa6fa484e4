"""`bert2bert status`: runs that train, end in every way, or go silent, by their folders alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bert2bert.commands.cli import main
from bert2bert.errors import InvalidData, UserError
from bert2bert.files import lock as lock_file
from bert2bert.recipe import Phase
from bert2bert.report import status as status_module
from bert2bert.report.status import BEAT, SILENT, render, status, statuses
from tests.distributed import run_ranks
from tests.train import runs, tiny


def some_ends(bins: Path, root: Path) -> dict[str, Any]:
    """Runs that finish, are stopped, pause, fail and, seen from inside, run."""
    from bert2bert.train import loop

    plan = runs.recipe(bins, phases=(Phase("first", 3), Phase("second", 3)), checkpoint_every=2)
    config, seen = tiny.ds_config(1), {}
    runs.run(plan, config, root / "finished")
    runs.run(plan, config, root / "stopped", stop_at=4)
    runs.run(plan, config, root / "paused", until="first")
    original = loop.Loop._save

    def fails(self: Any, *more: Any) -> None:
        seen["running"] = status(root / "failed").as_json()
        raise UserError("the disk is gone")

    loop.Loop._save = fails  # type: ignore[method-assign]
    with pytest.raises(UserError):
        runs.run(plan, config, root / "failed")
    loop.Loop._save = original  # type: ignore[method-assign]
    return seen


def test_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bins = runs.make_bins(tmp_path)
    seen = run_ranks(some_ends, 2, bins, tmp_path)[0]
    assert (seen["running"]["state"], seen["running"]["step"], seen["running"]["steps"]) == ("running", 2, 6)
    assert seen["running"]["loss"] > 0 and seen["running"]["seconds_left"] > 0
    found = {name: status(tmp_path / name) for name in ("finished", "stopped", "paused", "failed")}
    assert {name: one.state for name, one in found.items()} == {name: name for name in found}
    assert [found[name].why for name in ("stopped", "paused", "failed")] == [
        "SIGTERM", "--until first", "the disk is gone",
    ]  # fmt: skip
    one = found["stopped"]
    assert (one.step, one.phase, one.checkpoint, one.seconds_left) == (5, "second", "global_step5", None)
    size = sum(file.stat().st_size for file in (tmp_path / "stopped" / "global_step5").iterdir())
    assert one.checkpoint_bytes == size and one.held_out and one.disk_left_bytes > 0
    folders = [str(tmp_path / name) for name in found]
    assert main(["status", *folders[:3]]) == 0 and "5/6" in capsys.readouterr().out
    assert main(["status", *folders, "--json"]) == 1
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == list(found)
    assert "failed: the disk is gone" in render(list(found.values()))


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is renewed, one that is not, a line cut short; and no run at all."""
    run, lock = tmp_path / "run", tmp_path / "run" / "run.lock"
    run.mkdir()
    lock.write_text("{}")
    assert status(run).state == "starting"
    (run / "run.json").write_text(json.dumps({"recipe": {"phases": [{"steps": 9}]}, "continued": []}))
    record = {"kind": "train", "step": 3, "loss": 2.0, "seconds": 1.0, "phase": "all"}
    (run / "metrics.jsonl").write_text(json.dumps(record) + '\n{"kind": "train", "st')
    assert (status(run).state, status(run).step, status(run).steps) == ("running", 3, 9)
    assert (BEAT, SILENT) == (lock_file.BEAT, lock_file.SILENT)
    monkeypatch.setattr(status_module, "BEAT", 0.05)
    old = time.time() - 500
    for file in (lock, run / "run.json", run / "metrics.jsonl", run):
        os.utime(file, (old, old))
    found = status(run)
    assert found.state == "silent" and 490 < found.silent_seconds < 600 and "silent 0:08:" in render([found])
    assert main(["status", str(run)]) == 1
    with pytest.raises(InvalidData, match="is not a run's folder"):
        status(tmp_path)
    assert main(["status", str(run), "--watch", "0"]) == 2


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """A login node an hour ahead of the file system, or behind: what counts is whether the lock is renewed."""
    lock = tmp_path / "run.lock"
    lock.write_text("{}")

    def sleep(seconds: float, renewed: bool) -> None:
        assert seconds > lock_file.BEAT
        if renewed:
            os.utime(lock, (time.time() + skew + seconds,) * 2)

    for renewed, state in ((True, "starting"), (False, "silent")):
        os.utime(lock, (time.time() + skew,) * 2)
        monkeypatch.setattr(status_module.time, "sleep", partial(sleep, renewed=renewed))
        assert [one.state for one in statuses([tmp_path])] == [state]


def test_it_imports_no_torch() -> None:
    code = "import sys, bert2bert.commands.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
