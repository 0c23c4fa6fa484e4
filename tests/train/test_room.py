"""The room that a checkpoint takes, foretold at every stage, precision and size: of the disk and of memory."""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.steps import whole
from tests.train import tiny

SIZES = [(16, 3, 67), (64, 8, 67), (192, 4, 5000)]  # width, layers, vocabulary
CASES = [(0, "fp32"), (0, "bf16"), (1, "fp16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def sizes(root: Path) -> list[tuple[Any, int, int, int, int]]:
    """(Case, bytes foretold, bytes written; foretold and taken of this rank's memory) of stepped engines."""
    from bert2bert.model.registry import build
    from bert2bert.train import engine as engines
    from bert2bert.train import room
    from bert2bert.train.position import Position
    from bert2bert.train.save import save
    from bert2bert.train.writing import snapshot, tensors

    tiny.allow_fp16()
    world, found = int(os.environ["WORLD_SIZE"]), []
    for width, layers, vocab in SIZES:
        config = tiny.model_config(
            hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, vocab_size=vocab
        )
        plan = tiny.recipe(model=config)
        for stage, precision in CASES:
            torch.manual_seed(0)
            engine = engines.build(plan, tiny.ds_config(stage, precision, world, accumulation=1), build(config))
            engine.apply(whole(layers))
            loss, *_ = engine.forward(tiny.batch(0, rows=8 // world), whole(layers))
            engine.backward(loss)
            folder = save(
                engine, root / f"{width}-{stage}-{precision}", Position(1, 0, 1, 8), model=config, aliases={},
                recipe=plan.to_dict(), data={"digest": "", "tokenizer_digest": ""}, growth=None, keep=1,
                check=lambda: None,
            )  # fmt: skip
            written = sum(path.stat().st_size for path in folder.iterdir())
            copies: list[Any] = []
            engine.save(folder.parent, folder.name, lambda content, _, copies=copies: copies.append(snapshot(content)))
            storages = {(own := tensor.untyped_storage())._cdata: own.nbytes() for tensor in tensors(copies)}
            case = f"{width} {stage} {precision} on {world}"
            found.append((case, room.disk(engine), written, room.memory(engine), sum(storages.values())))
            engine.destroy()
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_room_is_foretold(world: int, tmp_path: Path) -> None:
    for found in run_ranks(sizes, world, tmp_path, timeout=140):
        for case, need, written, memory, taken in found:
            assert written <= need <= 1.01 * written + 100_000 * (1 + world), case
            assert taken <= memory + 20_000 and memory <= 1.01 * taken + 20_000, case


def test_a_run_is_told_what_may_not_hold_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three checkpoints lie there at a time: two are kept, and one is written."""
    from bert2bert.train import room

    usage, engine = namedtuple("usage", "total used free"), object()
    plan = tiny.recipe(keep_checkpoints=2, checkpoint_every=10, steps=100)
    monkeypatch.setattr(room, "disk", lambda _: 10**9)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(9e9, 6.5e9, 2.5e9))
    (line,) = room._few(engine, plan, tmp_path, 0)
    assert "3 more checkpoints of 1 GB" in line and "2.5 GB free" in line and "free 0.5 GB" in line
    assert not room._few(engine, plan, tmp_path, 85)  # two saves are left
    fewer = replace(plan, keep_checkpoints=1)
    assert not room._few(engine, fewer, tmp_path, 0)
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "bert2bert.json").touch()
    assert not room._few(engine, plan, tmp_path, 10)

    ranks = namedtuple("ranks", "allgather")(lambda own: [own, ("other", 4 * 10**9, 3 * 10**9)])
    monkeypatch.setattr(room, "RANKS", ranks)
    monkeypatch.setattr(room, "memory", lambda _: 10**9)
    monkeypatch.setattr(room, "free_memory", lambda: 2 * 10**9)
    (line,) = room._crowded(engine)
    assert "takes 4 GB of other's memory" in line and "3 GB are free" in line
