"""Modules whose state dict has other names than their parameters, or lacks some of them.

torch's wrapper for activation checkpointing takes its own name out of the state dict; some scripts leave a frozen tower
out of theirs. DeepSpeed's own strict loads, on two ranks, are the judge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.zero.wrapped import bare, with_wrappers
from bert2bert.commands.verify import verify
from tests import tiny
from tests.checkpoints.engines import release
from tests.distributed import run_ranks
from tests.doors import grow, reshard

CONFIG = tiny.config_of("gpt2")
DEEPER = CONFIG | {"n_layer": 2 * CONFIG["n_layer"]}
WRAPPER = "_checkpoint_wrapped_module"
Values = dict[str, list[Any]]


class Towered(nn.Module):
    """A model that keeps a frozen tower out of its state dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        self.tower = nn.Linear(3, 5)

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "tower." not in k}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False)


def wrapped(config: dict[str, Any], nested: bool) -> nn.Module:
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    for i, block in enumerate(model.transformer.h):
        block.mlp.register_buffer("seen", torch.zeros(2))
        if nested:
            block.mlp = checkpoint_wrapper(block.mlp)
        model.transformer.h[i] = checkpoint_wrapper(block)
    return model


def engine_of(kind: str, config: dict[str, Any], stage: int, seed: int, universal: bool = False) -> Any:
    import deepspeed

    model = Towered(config) if kind == "towered" else wrapped(config, kind == "nested")
    tiny.scramble(model, seed)
    for i, buffer in enumerate(model.buffers() if not seed else ()):
        buffer.fill_(i + 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("tower", "ln_1", "wpe")))
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def whole(engine: Any) -> Values:
    import deepspeed

    found = {bare(name): buffer.tolist() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[bare(name)] = parameter.tolist()
    return found


def saved(folder: str, kind: str, stage: int) -> Values:
    engine = engine_of(kind, CONFIG, stage, 0)
    ids = torch.arange(2, 10)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(folder)
    found = whole(engine)
    release(engine)
    return found


def loaded(folder: str, kind: str, config: dict[str, Any], stage: int, universal: bool = False) -> Values:
    engine = engine_of(kind, config, stage, 1, universal)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    found = whole(engine)
    release(engine)
    return found


def run(folder: Path, kind: str, stage: int) -> Values:
    truth = run_ranks(saved, 2, str(folder), kind, stage)[0]
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return truth


@pytest.mark.parametrize(("kind", "stage"), [("one", 1), ("nested", 2), ("one", 3)])
def test_wrapped_modules_load_again(kind: str, stage: int, tmp_path: Path) -> None:
    truth = run(tmp_path / "run", kind, stage)
    source = open_source(tmp_path / "run")
    assert not source.unread and len([*source.tensors, *source.buffers]) == len(truth)
    assert (
        sum(WRAPPER in name for name in [*source.tensors, *source.buffers]) == len(truth) - 4
    )  # less embeddings and the last norm
    for to in (0, 1, 2, 3):
        target = tmp_path / f"{to}"
        reshard(tmp_path / "run", target, format="zero", stage=to, world_size=2, say=lambda _: None)
        assert verify(tmp_path / "run", target).ok
        assert run_ranks(loaded, 2, str(target), kind, CONFIG, to)[0] == truth
    reshard(tmp_path / "run", tmp_path / "any", say=lambda _: None)
    found = run_ranks(loaded, 2, str(tmp_path / "any"), kind, CONFIG, 2, True)[0]
    trained = {bare(name) for name, meta in source.tensors.items() if meta.trainable}
    assert trained and all(found[name] == truth[name] for name in trained)


@pytest.mark.parametrize("to", [2, 3])
def test_wrapped_modules_grow(to: int, tmp_path: Path) -> None:
    truth = run(tmp_path / "run", "one", 5 - to)
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    grow(
        tmp_path / "run", tmp_path / "grown", tmp_path / "deeper.json", depth="stack", format="zero", stage=to,
        world_size=2, say=lambda _: None, measure=False,
    )  # fmt: skip
    for name, tensor in run_ranks(loaded, 2, str(tmp_path / "grown"), "one", DEEPER, to)[0].items():
        parts = name.split(".")
        origin = [str(int(p) % CONFIG["n_layer"]) if p.isdigit() else p for p in parts]
        assert tensor == truth[".".join(origin)], name


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_that_a_state_dict_lacks(stage: int, tmp_path: Path) -> None:
    truth = run(tmp_path / "run", "towered", stage)
    for to in (1, 2, 3):
        target = tmp_path / f"{to}"
        reshard(tmp_path / "run", target, format="zero", stage=to, world_size=2, say=lambda _: None)
        assert verify(tmp_path / "run", target).ok
        assert run_ranks(loaded, 2, str(target), "towered", CONFIG, to)[0] == truth


def test_a_state_dict_gets_the_names_of_wrappers() -> None:
    names = ["m.0.W.a.w", "m.2.W.a.W.w", "m.1.a.w", "h.W.x"]
    held = {"m.0.a.w": 1, "m.1.a.w": 2, "m.2.a.w": 3, "m.2.b": 4, "m.3.b": 5, "n.0.a": 6, "h.x": 7, "h.W.y": 8}
    held = {name.replace("W", WRAPPER): value for name, value in held.items()}
    found = with_wrappers(held, [name.replace("W", WRAPPER) for name in names])
    assert {name.replace(WRAPPER, "W"): value for name, value in found.items()} == {
        "m.0.W.a.w": 1, "m.1.a.w": 2, "m.2.W.a.W.w": 3, "m.2.W.b": 4, "m.3.W.b": 5, "n.0.a": 6, "h.W.x": 7, "h.W.y": 8
    }  # fmt: skip
    assert with_wrappers(held, ["m.0.a.w"]) == held
