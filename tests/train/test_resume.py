"""A run that was stopped and continued is the run that was never stopped, bit for bit, dropout on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.train import runs, tiny

CASES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "fp16"), (0, "fp16")]


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def straight_and_stopped(bins: Path, root: Path, cases: list[tuple[int, str]]) -> list[dict]:
    tiny.allow_fp16()
    plan, out = runs.recipe(bins), []
    for stage, precision in cases:
        config = tiny.ds_config(stage, precision)
        straight, stopped = root / f"straight{stage}{precision}", root / f"stopped{stage}{precision}"
        runs.run(plan, config, straight)
        out.append(runs.run(plan, config, stopped, stop_at=4))  # in the first step of the second phase
        again = runs.run(plan, config, stopped, resume=stopped)
        assert again["stopped"] is None and again["step"] == 8
    return out


@pytest.mark.timeout(150)
def test_continued_run_is_the_uninterrupted_one(bins: Path, tmp_path: Path) -> None:
    ranks = run_ranks(straight_and_stopped, 2, bins, tmp_path, CASES, timeout=140)
    for (stage, precision), summary in zip(CASES, ranks[0], strict=True):
        name = f"{stage}{precision}"
        straight, stopped = tmp_path / f"straight{name}", tmp_path / f"stopped{name}"
        assert summary["stopped"] == "SIGTERM" and summary["step"] == 5
        assert runs.records(stopped) == runs.records(straight), name
        losses = [r["loss"] for r in runs.records(straight) if r["kind"] == "train"]
        assert len(losses) == 8 and len(set(losses)) == 8
        a, b = runs.manifest(straight, 8), runs.manifest(stopped, 8)
        assert a["tensors"] == b["tensors"], name  # every weight's and moment's digest
        assert a["groups"] == b["groups"] and a["counters"] == b["counters"]
        assert {p.name for p in stopped.glob("global_step*")} == {"global_step6", "global_step8"}  # the last two
        about = json.loads((stopped / "run.json").read_text())
        assert about["finished"] and [c["step"] for c in about["continued"]] == [5]
        for file in ("ds_config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "latest"):
            assert (stopped / file).is_file()
        assert not (stopped / "global_step8" / "bert2bert.unfinished").exists()
