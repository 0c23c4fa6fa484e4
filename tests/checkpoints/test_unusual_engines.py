"""Engines of scripts that register modules in another order than transformers, have an optimizer group in which all is
frozen, or freeze parameters after the start.

DeepSpeed's own strict load, into an engine of the same kind, is the judge of order, groups and values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bert2bert.growth.script_order import script_order
from tests import tiny
from tests.checkpoints.engines import release
from tests.distributed import run_ranks
from tests.doors import grow, reshard

Held = dict[str, Any]  # arrays of NumPy, which travel between processes
EMBEDDINGS = "wte|wpe"


def turned_round(model: nn.Module) -> nn.Module:
    """The model with the children of each module registered last to first, so its head before its tied embedding."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            module._modules = dict(reversed(list(module._modules.items())))
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, what is frozen, and vectors, by rates of their own."""
    learn = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [
        {"params": [p for p in learn if p.dim() > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": frozen, "lr": 1e-4, "weight_decay": 0.3},
        {"params": [p for p in learn if p.dim() == 1], "lr": 2e-2, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if re.search(EMBEDDINGS, name):
            parameter.requires_grad = False


def engine_of(kind: str, config: dict[str, Any], stage: int, seed: int) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    if kind == "order":
        turned_round(model)
    if kind == "group":
        freeze(model)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    optimizer = torch.optim.AdamW(groups_of(model))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def held(engine: Any) -> tuple[Held, list[float]]:
    """Weights by name, and the rates of the groups."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().numpy().copy()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found, [group["lr"] for group in optimizer.param_groups]


def saved(folder: str, kind: str, config: dict[str, Any], stage: int) -> tuple[Held, list[float]]:
    engine = engine_of(kind, config, stage, 0)
    engine.backward(engine(input_ids=torch.arange(2, 10)[None], labels=torch.arange(2, 10)[None]).loss)
    engine.step()
    if kind == "later":
        freeze(engine.module)
    engine.save_checkpoint(folder)
    found = held(engine)
    release(engine)
    return found


def loaded(folder: str, kind: str, config: dict[str, Any], stage: int) -> tuple[Held, list[float]]:
    engine = engine_of(kind, config, stage, 1)
    if kind == "later":
        freeze(engine.module)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    found = held(engine)
    release(engine)
    return found


@pytest.mark.parametrize("kind,stages", [("order", (2, 1)), ("group", (3, 3)), ("later", (3, 2))])
def test_resharded_and_grown_they_load_into_their_own_engine(
    kind: str, stages: tuple[int, int], tmp_path: Path
) -> None:
    config = tiny.config_of("gpt2")
    layers = config["n_layer"]
    larger = config | {"n_layer": 2 * layers}
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    weights, rates = run_ranks(saved, 2, str(tmp_path / "run"), kind, config, stages[0])[0]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    how: dict[str, Any] = {"format": "zero", "stage": stages[1], "world_size": 2, "say": lambda _: None}
    reshard(tmp_path / "run", tmp_path / "same", **how)
    grow(tmp_path / "run", tmp_path / "grown", tmp_path / "larger.json", depth="stack", measure=False, **how)
    for folder, sizes in (("same", config), ("grown", larger)):
        found, again = run_ranks(loaded, 2, str(tmp_path / folder), kind, sizes, stages[1])[0]
        assert again == rates
        for name, value in found.items():
            origin = re.sub(r"\.h\.(\d+)\.", lambda at: f".h.{int(at[1]) % layers}.", name)
            assert (value == weights[origin]).all(), (folder, name)


def test_a_group_that_stages_1_and_2_cannot_have_is_reported(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2")
    run_ranks(saved, 2, str(tmp_path / "run"), "group", config, 3)
    lines: list[str] = []
    reshard(tmp_path / "run", tmp_path / "out", format="zero", stage=2, world_size=2, say=lines.append)
    assert "groups without a trained parameter are left out: 1 of the source (lr 0.0001)" in "\n".join(lines)


def test_an_embedding_registered_behind_its_head_is_untied(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2")
    (tmp_path / "untied.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights, _ = run_ranks(saved, 2, str(tmp_path / "run"), "order", config, 2)[0]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    grow(
        tmp_path / "run", tmp_path / "out", tmp_path / "untied.json", embeddings="untie", measure=False,
        say=lambda _: None,
    )  # fmt: skip
    zero = next((tmp_path / "out").glob("*/zero"))
    for name in ("lm_head.weight", "transformer.wte.weight"):
        value = torch.load(zero / name / "fp32.pt", weights_only=False)
        assert (value["param"].reshape(-1).numpy() == weights["lm_head.weight"].reshape(-1)).all()


def test_the_order_of_a_script() -> None:
    before = ["m.z.w", "m.h.0.b.w", "m.h.0.a.w", "m.h.1.b.w", "m.h.1.a.w", "m.e.w"]
    after = ["m.e.w", *(f"m.h.{i}.{part}.w" for i in range(11) for part in "ab"), "m.z.w"]
    wanted = ["m.z.w", *(f"m.h.{i}.{part}.w" for i in range(11) for part in "ba"), "m.e.w"]
    assert script_order(before, after) == wanted
    assert script_order(sorted(before), after) == after  # transformers' own order, of some of the names
    assert script_order(before, [*after, "head.w"]) is None
    assert script_order(["m.h.0.w", "m.e.w", "m.h.1.w"], ["m.e.w", "m.h.0.w", "m.h.1.w"]) == [
        "m.e.w", "m.h.0.w", "m.h.1.w",
    ]  # fmt: skip
