"""One command for start and restart: --resume auto."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert2bert.errors import InvalidCheckpoint
from bert2bert.recipe import Phase, Recipe
from tests.distributed import run_ranks
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def plan_for(bins: Path, **other: Any) -> Recipe:
    return runs.recipe(bins, phases=(Phase("all", 8),), checkpoint_every=2, keep_checkpoints=3, **other)


def again(bins: Path, output: Path, stop_at: int | None = None, start: Path | None = None) -> Any:
    return runs.run(plan_for(bins), tiny.ds_config(2), output, "auto", stop_at, start=start)


def story(bins: Path, root: Path) -> dict[str, Any]:
    """The same command, started until the run is at its end; what else it finds on the way."""
    import torch.distributed as dist

    found: dict[str, Any] = {"stopped": [again(bins, root / "run", 4)["stopped"]]}
    if dist.get_rank() == 0:  # the newest is cut short, the one before has another byte
        newest, before = (root / "run" / f"global_step{step}" for step in (5, 4))
        file = next(newest.glob("*optim_states.pt"))
        file.write_bytes(file.read_bytes()[:-100])
        file = next(before.glob("*optim_states.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    dist.barrier()
    found["stopped"].append(again(bins, root / "run")["stopped"])
    found["whole"] = runs.run(plan_for(bins), tiny.ds_config(2), root / "whole")["stopped"]
    plan = plan_for(bins, keep_every=4)
    runs.run(replace(plan, keep_checkpoints=1), tiny.ds_config(2), root / "kept")
    found["done"] = again(bins, root / "run")["step"]
    found["from"] = again(bins, root / "later", 4, root / "whole" / "global_step4")["step"]
    found["from again"] = again(bins, root / "later", None, root / "whole" / "global_step4")["step"]
    if dist.get_rank() == 0:
        for file in (root / "later").glob("global_step*/bert2bert.json"):
            file.write_text("{")
    dist.barrier()
    with pytest.raises(InvalidCheckpoint, match="all of its checkpoints were damaged"):
        again(bins, root / "later")
    return found


@pytest.mark.timeout(150)
def test_the_same_command_starts_goes_on_and_passes_damaged_checkpoints(bins: Path, tmp_path: Path) -> None:
    found = run_ranks(story, 2, bins, tmp_path, timeout=120)[0]
    assert found["stopped"] == ["SIGTERM", None] and found["done"] == 8
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    aside = {path.name for path in (tmp_path / "run").glob("*.damaged")}
    assert aside == {"global_step4.damaged", "global_step5.damaged"}
    assert (tmp_path / "run" / "latest").read_text() == "global_step8"
    assert {p.name for p in (tmp_path / "kept").glob("global_step*")} == {"global_step4", "global_step8"}
    assert found["from"] == 5 and found["from again"] == 8  # --from only where the folder has none of its own
