"""Steps that fp16 drops because gradients overflowed are counted in metrics.jsonl, over interruptions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bert2bert.recipe import Phase
from tests.distributed import run_ranks
from tests.train import runs, tiny

STAGES = (0, 3)
STEPS = 8


def stopped_and_continued(bins: Path, root: Path) -> None:
    tiny.allow_fp16()
    plan = runs.recipe(bins, phases=(Phase("all", STEPS),), eval_every=100, checkpoint_every=100)
    for stage in STAGES:
        config = tiny.ds_config(stage, "fp16")
        config["fp16"] = {"enabled": True, "initial_scale_power": 21, "hysteresis": 1, "loss_scale_window": 1000}
        runs.run(plan, config, root / str(stage), stop_at=1)
        runs.run(plan, config, root / str(stage), resume=root / str(stage))


@pytest.mark.timeout(90)
def test_dropped_steps_are_counted(tmp_path: Path) -> None:
    run_ranks(stopped_and_continued, 2, runs.make_bins(tmp_path), tmp_path, timeout=80)
    for stage in STAGES:
        records = [r for r in runs.records(tmp_path / str(stage)) if r["kind"] == "train"]
        counts = [0] + [r["skipped_steps"] for r in records]
        assert len(records) == STEPS and 2 < counts[-1] < STEPS, (stage, counts)
        scales = [2.0**21] + [r["loss_scale"] for r in records]
        dropped = [after - before for before, after in pairwise(counts)]
        assert dropped == [int(after < before) for before, after in pairwise(scales)], (stage, counts, scales)
        early, last = (runs.manifest(tmp_path / str(stage), step) for step in (2, STEPS))
        for manifest, records_until in ((early, 2), (last, STEPS)):
            assert manifest["counters"]["skipped_steps"] == counts[records_until]
            assert {g["step"] for g in manifest["groups"] if g["part"] != "unused"} == {
                records_until - counts[records_until]
            }
