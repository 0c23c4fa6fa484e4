"""A rank killed in the middle of a save leaves the older checkpoint in force, and the run goes on from it."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.recipe import Phase
from tests.distributed import run_ranks
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def plan_for(bins: Path) -> Any:
    return runs.recipe(bins, phases=(Phase("all", 6),), checkpoint_every=2, eval_every=6, keep_checkpoints=2)


def die_in_second_save(bins: Path, output: Path, victim: int, where: str) -> None:
    """The victim is killed half-way through a file of the second checkpoint, or before `latest` is set."""
    from bert2bert.train import save

    rank = int(os.environ["RANK"])
    original, set_latest = torch.save, save.set_latest

    def half(value: Any, path: Any, *more: Any, **other: Any) -> None:
        if rank == victim and where in Path(path).name and Path(path).parent.name == "global_step4":
            buffer = io.BytesIO()
            original(value, buffer)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(value, path, *more, **other)

    def before_latest(root: Path, tag: str, *more: Any) -> None:
        if where == "latest" and tag == "global_step4":
            os.kill(os.getpid(), signal.SIGKILL)
        set_latest(root, tag, *more)

    torch.save, save.set_latest = half, before_latest
    runs.run(plan_for(bins), tiny.ds_config(2), output)


def go_on(bins: Path, output: Path) -> dict[str, Any]:
    return runs.run(plan_for(bins), tiny.ds_config(2), output, resume=output)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("victim", "where"), [(0, "model_states"), (1, "optim_states"), (1, "bert2bert_rng"), (0, "latest")]
)
def test_kill_in_a_save(bins: Path, tmp_path: Path, victim: int, where: str) -> None:
    output = tmp_path / "run"
    with pytest.raises(RuntimeError, match=rf"rank {victim} died with exit code -9|Connection closed|failed"):
        run_ranks(die_in_second_save, 2, bins, output, victim, where, timeout=60)
    assert (output / "latest").read_text() == "global_step2"
    whole = (output / "global_step4" / "bert2bert.json").exists()
    assert whole == (where == "latest")
    for summary in run_ranks(go_on, 2, bins, output, timeout=60):
        assert summary["step"] == 6 and summary["stopped"] is None
    assert (output / "latest").read_text() == "global_step6"
    assert {p.name for p in output.glob("global_step*")} == {"global_step4", "global_step6"}
    about = json.loads((output / "run.json").read_text())
    assert [c["step"] for c in about["continued"]] == [2]
    steps = [r["step"] for r in runs.records(output) if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_kills_between_two_calls_leave_nothing_that_looks_foreign(tmp_path: Path) -> None:
    """A folder just made, without its mark, and one that a deletion has emptied up to any file."""
    from bert2bert.train import save

    folder = tmp_path / "global_step2"
    folder.mkdir()
    assert save._kind(folder) is None
    seen = set()
    original = Path.unlink

    def unlink(self: Path, *more: Any, **how: Any) -> None:
        original(self, *more, **how)
        seen.add(save._kind(folder))

    for name in ("a.pt", save.UNFINISHED, "z.pt"):
        (folder / name).write_text("")
    (folder / "sub").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        save._delete(folder)
    assert seen == {None} and not folder.exists()
