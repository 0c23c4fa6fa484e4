"""Checkpoints of scripts that share a module object between layers or keep one under two attributes, and tags that are
a folder in a folder.

DeepSpeed's own strict load is the judge: under ZeRO 3 it writes the names of a shared module's copies, without values
and without saying of what they are copies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bert2bert.checkpoints.open import open_source
from bert2bert.growth.second_names import second_names
from tests import tiny
from tests.checkpoints.engines import release
from tests.distributed import run_ranks
from tests.doors import grow, reshard

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


class Kept(nn.Module):
    """A model whose body, and whose last layer, have a second name, as in scripts that reach for them often."""

    def __init__(self, config: dict[str, Any], last: bool) -> None:
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        self.body, self.words = self.model.transformer, self.model.transformer.wte
        if last:
            self.last = self.model.transformer.h[-1]

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(input_ids=ids, labels=ids).loss


def kept_engine(config: dict[str, Any], stage: int, last: bool) -> Any:
    import deepspeed

    model = Kept(config, last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def kept_saved(folder: str, config: dict[str, Any], stage: int, last: bool) -> None:
    engine = kept_engine(config, stage, last)
    engine.backward(engine(torch.arange(2, 10)[None]))
    engine.step()
    engine.save_checkpoint(folder)
    release(engine)


def kept_loaded(folder: str, config: dict[str, Any], stage: int, last: bool, strict: bool) -> None:
    engine = kept_engine(config, stage, last)
    path, _ = engine.load_checkpoint(folder, load_module_strict=strict)
    assert path is not None
    release(engine)


def test_a_module_under_two_names_grows_with_both(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2")
    larger = config | {"n_layer": 2 * config["n_layer"]}
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    for last in (False, True):
        run = tmp_path / f"run{last}"
        run_ranks(kept_saved, 2, str(run), config, 2, last)
        (run / "config.json").write_text(json.dumps(config))
        for stage in (2, 3):
            lines: list[str] = []
            target = tmp_path / f"grown{last}{stage}"
            grow(
                run, target, tmp_path / "larger.json", depth="stack", format="zero", stage=stage, world_size=2,
                say=lines.append, measure=False,
            )  # fmt: skip
            # Which layer of the grown model the script calls its last is not to be known: these names are reported.
            assert ("names of the source's state dict are left out, first last." in "\n".join(lines)) == last
            run_ranks(kept_loaded, 2, str(target), larger, stage, last, not last)


def test_second_names_are_those_of_whole_modules() -> None:
    before, after = ["m.a.0.w", "m.e.w"], ["m.a.0.w", "m.a.1.w", "m.e.w"]
    own = {"m.head.w": "m.e.w"}
    twice = {f"n.{name[2:]}": name for name in before}
    found = {f"n.{name[2:]}": name for name in after} | {"n.head.w": "m.e.w"}
    assert second_names({**own, **twice, "n.head.w": "m.e.w"}, own, before, after) == (found, [])
    assert second_names({"x.w": "m.a.0.w"}, {}, before, after) == ({}, ["x.w"])
    assert second_names({"x.w": "m.a.0.w"}, {}, before, before) == ({"x.w": "m.a.0.w"}, [])
    assert second_names({"n.a.0.w": "m.a.0.w"}, {}, ["m.a.0.w", "m.a.0.b"], after) == ({}, ["n.a.0.w"])
