"""Checkpoints of scripts that share a module object between layers, and tags that are a folder in a folder.

DeepSpeed's own strict load is the judge: under ZeRO 3 it writes the names of a shared module's copies, without values
and without saying of what they are copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert2bert.checkpoints.open import open_source
from tests.checkpoints.engines import release
from tests.distributed import run_ranks
from tests.doors import reshard

TAG = "epoch 1/step=2"
COPIES = ["2.weight", "2.bias"]


def engine_of(stage: int) -> Any:
    import deepspeed

    torch.manual_seed(1)
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.Tanh(), block, nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def losses(engine: Any, first: int) -> list[float]:
    found = []
    for step in range(first, first + 2):
        batch = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        loss = engine(batch).square().sum()
        engine.backward(loss)
        engine.step()
        found.append(float(loss))
    return found


def saved(folder: str, stage: int) -> list[float]:
    engine = engine_of(stage)
    losses(engine, 0)
    engine.save_checkpoint(folder, tag=TAG)
    after = losses(engine, 2)
    release(engine)
    return after


def resumed(folder: str, stage: int, strict: bool) -> list[float]:
    engine = engine_of(stage)
    path, _ = engine.load_checkpoint(folder, load_module_strict=strict)
    assert path is not None
    after = losses(engine, 2)
    release(engine)
    return after


def test_a_shared_module_and_a_tag_with_a_slash(tmp_path: Path) -> None:
    after = run_ranks(saved, 2, str(tmp_path / "run"), 3)[0]
    (tmp_path / "run/config.json").write_text('{"model_type": "odd"}')
    source = open_source(tmp_path / "run")
    assert (source.tag, list(source.unread), source.config) == (TAG, COPIES, {"model_type": "odd"})
    for stage, said in ((3, "2.bias"), (2, "looks for them, load with load_module_strict=False")):
        lines: list[str] = []
        target = tmp_path / str(stage)
        reshard(tmp_path / "run", target, format="zero", stage=stage, world_size=2, say=lines.append)
        assert (target / "latest").read_text() == TAG and open_source(target).tag == TAG
        assert any(line.endswith(said) for line in "\n".join(lines).splitlines())
        found = run_ranks(resumed, 2, str(target), stage, stage == 3)[0]
        torch.testing.assert_close(found, after, rtol=1e-6, atol=0)
