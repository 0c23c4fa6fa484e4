"""Runs that grow between their phases: in the job, as separate jobs, stopped and killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert2bert.commands import phase_growth
from bert2bert.files.digest import file_digest
from bert2bert.ranks.distributed import RANKS
from bert2bert.recipe import AdamW, Data, Grow, Phase, Recipe, Schedule, SubModels
from bert2bert.train.growing import layout
from tests.distributed import run_ranks
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def recipe(bins: Path, **other: Any) -> Recipe:
    """Small, then twice as wide and deep under sub-models, then all of it; the second with longer rows."""
    large = Grow({"hidden_size": "2x", "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64})
    given: dict[str, Any] = {
        "name": "grows", "model": tiny.model_config(0.1), "data": Data(bins=str(bins), seq_len=16, eval_rows=8),
        "global_batch_size": 8, "optimizer": AdamW(lr=5e-3, weight_decay=0.1), "seed": 3,
        "eval_every": 4, "checkpoint_every": 3, "keep_checkpoints": 2, "log_every": 1,
        "phases": (
            Phase("small", 4, schedule=Schedule("linear", warmup_steps=2)),
            Phase("sub-models", 3, SubModels(2), grow=large, seq_len=32, global_batch_size=4),
            Phase("full", 4, schedule=Schedule("cosine", peak=3e-3)),
        ),
    }  # fmt: skip
    return Recipe(**(given | other))


def growing(plan: Recipe, stage: int, output: Path, resume: Path | None = None, **how: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    return runs.run(plan, config, output, resume, grow=phase_growth.grow, **how)


def both(plan: Recipe, stage: int, root: Path) -> None:
    growing(plan, stage, root / "whole")
    growing(plan, stage, root / "first", until="small")
    source = root / "first" / "global_step4"
    target = layout({"zero_optimization": {"stage": stage}})
    phase_growth.grow(plan, 1, source, root / "grown", target, RANKS, other=None)
    growing(plan, stage, root / "second", root / "grown")


@pytest.mark.parametrize("stage", [0, 3])
def test_a_growth_in_the_job_is_the_chain_of_jobs(bins: Path, tmp_path: Path, stage: int) -> None:
    """The same losses, weights, moments, steps and random states, bit for bit."""
    run_ranks(both, 2, recipe(bins), stage, tmp_path)
    whole, second = runs.records(tmp_path / "whole"), runs.records(tmp_path / "second")
    assert [r["growths"] for r in whole if r["kind"] == "eval"] == [0, 0, 1, 1, 1]
    assert [r for r in whole if r["growths"]] == second
    assert [(r["phase"], r["step"]) for r in whole if r["kind"] == "train"][3:5] == [("small", 4), ("sub-models", 5)]
    last = [runs.manifest(tmp_path / run, 11) for run in ("whole", "second")]
    assert all(last[0][key] == last[1][key] for key in ("tensors", "groups", "counters", "model"))
    states = [sorted((tmp_path / run / "global_step11").glob("bert2bert_rng*")) for run in ("whole", "second")]
    assert [file_digest(a) for a in states[0]] == [file_digest(b) for b in states[1]]
    training = runs.manifest(tmp_path / "whole", 11)["training"]
    assert (training["growths"], training["ended"], training["phase"]) == (1, [4, 7], 2)
    assert not (tmp_path / "whole" / "growths").exists()
