"""Zeros that a growth inserts join the optimizer group of their kind: an engine of the same script loads the growth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from bert2bert.growth import grow
from tests import tiny
from tests.distributed import run_ranks
from tests.shards.engines import hf_model, release


def kind(name: str) -> int:
    """The group of a script that sorts by name. That of the embeddings is the first that decays."""
    if "norm" in name or "lm_head" in name:
        return 0
    return 1 if "embed_tokens" in name else 2


def engine_of(config: dict[str, Any], stage: int) -> Any:
    named = dict((model := hf_model(config)).named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if kind(n) == i], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i}
        for i in range(3)
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=settings)[0]


def loss_of(engine: Any, config: dict[str, Any]) -> float:
    with torch.no_grad():
        loss = float(tiny.loss(engine, config, seed=9))
    release(engine)
    return loss


def saved(config: dict[str, Any], folder: str) -> float:
    engine = engine_of(config, 2)
    for step in range(2):
        engine.backward(tiny.loss(engine, config, seed=step))
        engine.step()
    engine.save_checkpoint(folder)
    return loss_of(engine, config)


def resumed(config: dict[str, Any], stage: int, folder: str) -> tuple[float, list[float]]:
    """Loss and learning rates after DeepSpeed's own strict load."""
    engine = engine_of(config, stage)
    assert engine.load_checkpoint(folder)[0]
    rates = [group["lr"] for group in engine.optimizer.optimizer.param_groups]
    return loss_of(engine, config), rates


@pytest.mark.parametrize("stage", [2, 3])
def test_an_inserted_blocks_zeros_join_the_group_of_their_kind(tmp_path: Path, stage: int) -> None:
    small = tiny.config_of("llama")
    deep = small | {"num_hidden_layers": 2 * small["num_hidden_layers"], "layer_types": None}
    for name, config in (("small", small), ("deep", deep)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    before = run_ranks(saved, 2, small, str(tmp_path / "run"))[0]
    grow(
        tmp_path / "run", tmp_path / "grown", tmp_path / "deep.json", source_config=tmp_path / "small.json",
        depth="insert_identity", form="zero", stage=stage, world_size=2, measure=False, say=lambda _: None,
    )  # fmt: skip
    manifest = json.loads(next((tmp_path / "grown").glob("*/bert2bert.json")).read_text())
    assert all(kind(name) == i for i, group in enumerate(manifest["groups"]) for name in group["names"])
    loss, rates = run_ranks(resumed, 2, deep, stage, str(tmp_path / "grown"))[0]
    assert loss == pytest.approx(before, abs=1e-5)
    assert rates == [1e-3, 2e-3, 3e-3]
