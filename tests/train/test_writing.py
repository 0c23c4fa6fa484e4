"""Checkpoints written behind training: the files of a save at once, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.errors import UserError
from bert2bert.files.digest import file_digest
from bert2bert.recipe import Phase, Recipe
from tests.distributed import run_ranks
from tests.steps import whole
from tests.train import runs, tiny

CASES = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "fp16"), (3, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def both_ways(folder: Path) -> dict[Any, dict[str, tuple[str, str]]]:
    """Digests of every file of this rank, written at once, and behind two steps that were made before it was begun."""
    from bert2bert.train import engine as engines
    from bert2bert.train.writing import Files

    tiny.allow_fp16()
    found: dict[Any, dict[str, tuple[str, str]]] = {}
    for stage, precision in CASES:
        engine = engines.build(tiny.recipe(), tiny.ds_config(stage, precision, accumulation=1), tiny.model())

        def steps(first: int, engine: Any = engine) -> None:
            engine.apply(whole(tiny.LAYERS))
            for seed in range(first, first + 2):
                loss, *_ = engine.forward(tiny.batch(seed, rows=4), whole(tiny.LAYERS))
                engine.backward(loss)

        steps(0)
        engine.thaw()
        ways = [Files(folder / f"{stage}{precision}{name}" / "tag", name == "behind") for name in ("once", "behind")]
        for way in ways:
            engine.save(way.folder.parent, "tag", way.add)
        steps(2)
        ways[1].start()
        once, behind = (way.finish() for way in ways)
        found[stage, precision] = {name: (once[name], behind[name]) for name in once | behind}
        engine.destroy()
    return found


@pytest.mark.timeout(120)
def test_a_file_written_behind_training_has_the_bytes_of_one_written_at_once(tmp_path: Path) -> None:
    for found in run_ranks(both_ways, 2, tmp_path, timeout=110):
        assert list(found) == CASES
        for case, files in found.items():
            assert all(once == behind for once, behind in files.values()), case
    for stage, precision in CASES:
        written = {path.name for path in (tmp_path / f"{stage}{precision}once" / "tag").iterdir()}
        assert written == {path.name for path in (tmp_path / f"{stage}{precision}behind" / "tag").iterdir()}
        assert len(written) == {0: 1, 3: 4}.get(stage, 3)


def plan_for(bins: Path, behind: bool = True) -> Recipe:
    return runs.recipe(
        bins, phases=(Phase("all", 8),), checkpoint_every=2, eval_every=8, keep_checkpoints=9, checkpoint_async=behind
    )


def slowly(do: Any, seconds: float = 0.3) -> None:
    """Let a thread beside the main one take its time for every file, or do something else. ``do``: with the path."""
    original = torch.save

    def save(value: Any, path: Any, *more: Any, **other: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)
            do(Path(path), value)
        original(value, path, *more, **other)

    torch.save = save


def story(bins: Path, root: Path) -> dict[str, Any]:
    import torch.distributed as dist

    from bert2bert.train import loop

    config, found = tiny.ds_config(2), {}
    runs.run(plan_for(bins, behind=False), config, root / "once")
    slowly(lambda path, value: None)
    overlapped = []
    original = loop.Loop._optimizer_step

    def step(self: Any, phase: Any) -> Any:
        overlapped.append(self.saving is not None)
        return original(self, phase)

    loop.Loop._optimizer_step = step
    runs.run(plan_for(bins), config, root / "behind")
    loop.Loop._optimizer_step = original
    found["overlapped"] = sum(overlapped)
    found["stopped"] = runs.run(plan_for(bins), config, root / "stopped", stop_at=4)["stopped"]
    found["left"] = sorted(p.parent.name for p in (root / "stopped").glob("global_step*/bert2bert.json"))
    runs.run(plan_for(bins), config, root / "stopped", resume=root / "stopped")

    def full(path: Path, value: Any) -> None:
        if path.parent.name == "global_step4" and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    slowly(full, 0)
    try:
        runs.run(plan_for(bins), config, root / "full")
    except UserError as error:
        found["full"] = str(error)
    return found


@pytest.mark.timeout(150)
def test_runs_that_save_behind_training(bins: Path, tmp_path: Path) -> None:
    """Slow disks, a stop in the middle of a write, a full disk of one rank."""
    for found in run_ranks(story, 2, bins, tmp_path, timeout=140):
        assert found["overlapped"] >= 3  # else nothing here was written behind training
        assert found["stopped"] == "SIGTERM" and found["left"] == ["global_step2", "global_step4", "global_step5"]
        assert "no room left on the disk" in found["full"] and "global_step4" in found["full"]
    for name in ("behind", "stopped"):
        assert runs.records(tmp_path / name) == runs.records(tmp_path / "once")
        for step in (2, 4, 6, 8):
            once, other = (runs.manifest(tmp_path / run, step) for run in ("once", name))
            assert once["tensors"] == other["tensors"] and once["groups"] == other["groups"]
            assert set(other["digests"]["files"]) == set(once["digests"]["files"]) == set(other["files"])
            for file, digest in other["digests"]["files"].items():
                assert digest == file_digest(tmp_path / name / f"global_step{step}" / file)
    assert (tmp_path / "full" / "latest").read_text() == "global_step2"
    assert not (tmp_path / "full" / "global_step4" / "bert2bert.json").exists()


def die_behind(bins: Path, output: Path, victim: int) -> None:
    def die(path: Path, value: Any) -> None:
        if path.parent.name == "global_step4" and "optim" in path.name and int(os.environ["RANK"]) == victim:
            path.write_bytes(b"PK half of a file")
            os.kill(os.getpid(), signal.SIGKILL)

    slowly(die, 0.1)
    runs.run(plan_for(bins), tiny.ds_config(2), output)


def go_on(bins: Path, root: Path) -> None:
    runs.run(plan_for(bins), tiny.ds_config(2), root / "run", resume=root / "run")
    runs.run(plan_for(bins, behind=False), tiny.ds_config(2), root / "once")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_writes_behind_training(bins: Path, tmp_path: Path, victim: int) -> None:
    output = tmp_path / "run"
    with pytest.raises(RuntimeError, match=rf"rank {victim} died with exit code -9|Connection closed|failed"):
        run_ranks(die_behind, 2, bins, output, victim, timeout=60)
    assert (output / "latest").read_text() == "global_step2"
    assert not (output / "global_step4" / "bert2bert.json").exists()
    run_ranks(go_on, 2, bins, tmp_path, timeout=80)
    assert runs.records(output) == runs.records(tmp_path / "once")
    assert runs.manifest(output, 8)["tensors"] == runs.manifest(tmp_path / "once", 8)["tensors"]
