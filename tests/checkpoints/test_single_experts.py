"""Runs of mixtures whose experts are modules of their own, as those of transformers 4: grown with their moments.

Engines train and load such models; the truth is what DeepSpeed's own functions say of them, and transformers' fused
model of the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bert2bert
from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.checkpoints.job import TargetGroup
from bert2bert.checkpoints.open import open_source
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth
from bert2bert.growth.factors import of_growth
from bert2bert.growth.opened import open_growth
from bert2bert.growth.source_model import open_model
from tests import tiny
from tests.checkpoints.engines import STATES, Case, hf_model, release, truth
from tests.checkpoints.targets import make_spec, reader
from tests.distributed import run_ranks
from tests.doors import grow, reshard, write_checkpoint

MAPS = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "down_proj", "up_proj")}
"""Of an expert's gate, down and up."""
BLOCK = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
QUIET: dict[str, Any] = {"measure": False, "say": lambda _: None}


class Expert(nn.Module):
    def __init__(self, kind: str, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        gate, up = up.chunk(2)
        own = dict(zip(MAPS[kind], (gate, down, up), strict=True))
        for name in sorted(own) if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj"):  # as in transformers 4
            linear = nn.Linear(*reversed(own[name].shape), bias=False)
            linear.weight.data = own[name].clone()
            self.add_module(name, linear)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, down, up = (self.get_submodule(name) for name in MAPS[self.kind])
        return down(F.silu(gate(x)) * up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A router, then the experts."""

    def __init__(self, kind: str, fused: Any, chosen: int) -> None:
        super().__init__()
        experts, embed = fused.gate.weight.shape
        self.gate = nn.Linear(embed, experts, bias=False)
        self.gate.weight.data = fused.gate.weight.data.clone()
        pairs = zip(fused.experts.gate_up_proj.data, fused.experts.down_proj.data, strict=True)
        self.experts = nn.ModuleList(Expert(kind, up, down) for up, down in pairs)
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * weights[..., None]).sum(-2)


def single(config: dict[str, Any]) -> Any:
    """The transformers model of a config with its experts one by one."""
    kind, model = config["model_type"], hf_model(config)
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        block = Block(kind, layer.mlp, config["num_experts_per_tok"])
        modules = {BLOCK[kind] if name == "mlp" else name: module for name, module in layer._modules.items()}
        layer._modules = modules | {BLOCK[kind]: block}
        if kind == "mixtral":
            layer.__class__ = type("Layer", (type(layer),), {"mlp": property(lambda self: self.block_sparse_moe)})
    return model


def engine_of(case: Case) -> Any:
    model = single(case.hf)
    named = dict(model.named_parameters())
    groups = param_groups(by_name({name: p.shape for name, p in named.items()}), "decay")
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in g.names], "weight_decay": 0.1 * g.decay} for g in groups], lr=1e-3
    )
    settings = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {"stage": case.stage},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.group_names = [g.names for g in groups]
    return engine


def told(engine: Any, case: Case, folder: Path) -> float:
    """The loss; what the engine holds goes into the case's truth file."""
    found = truth(engine, case)
    if torch.distributed.get_rank() == 0:
        torch.save(found["tensors"], folder / f"{case.name}.truth.pt")
    with torch.no_grad():
        loss = float(tiny.loss(engine, case.hf, seed=9))
    release(engine)
    return loss


def saved(case: Case, folder: Path) -> float:
    engine = engine_of(case)
    for step in range(case.steps):
        engine.backward(tiny.loss(engine, case.hf, seed=10 * step + torch.distributed.get_rank()))
        engine.step()
    engine.save_checkpoint(str(folder / case.name))
    return told(engine, case, folder)


def resumed(case: Case, folder: Path) -> float:
    engine = engine_of(case)
    assert engine.load_checkpoint(str(folder / case.name))[0]
    assert engine.global_steps == case.steps
    return told(engine, case, folder)


def write(folder: Path, **configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("kind", "stage"), [("mixtral", 2), ("qwen3_moe", 3)])
def test_every_expert_grows_with_its_moments(kind: str, stage: int, tmp_path: Path) -> None:
    """Twice the layers and twice the experts, of which a token is sent to twice as many: all values are known."""
    small = tiny.config_of(kind)
    keys = {"num_hidden_layers": 6, "num_experts_per_tok": 2 * small["num_experts_per_tok"]}
    large = tiny.config_of(kind, **keys, num_local_experts=10)
    write(tmp_path, small=small, large=large)
    case = Case("run", stage, steps=2, hf=small)
    run_ranks(saved, 2, case, tmp_path)
    how: dict[str, Any] = {
        "source_config": tmp_path / "small.json", "depth": "stack", "experts": "duplicate", **QUIET
    }  # fmt: skip
    grow(tmp_path / "run", tmp_path / "grown", tmp_path / "large.json", format="zero", stage=stage, world_size=2, **how)
    run_ranks(resumed, 2, Case("grown", stage, steps=2, hf=large), tmp_path)
    was, now = (torch.load(tmp_path / f"{name}.truth.pt") for name in ("run", "grown"))
    universal = grow(tmp_path / "run", tmp_path / "u", tmp_path / "large.json", format="universal", **how)
    assert len(now) == 2 * (len(was) - 3) + 3 + 6 * 5 * 3
    for name, states in now.items():
        parts = name.split(".")
        for at in (i for i, part in enumerate(parts) if part == "layers"):
            parts[at + 1] = str(int(parts[at + 1]) % 3)
        expert = parts.index("experts") if "experts" in parts else None
        if expert is not None:
            parts[expert + 1] = str(int(parts[expert + 1]) % 5)
        for power, state in enumerate(STATES):
            wanted = was[".".join(parts)][state]
            if ".gate." in name:
                wanted = torch.cat([wanted, wanted])
            if expert is not None or ".gate." in name:
                wanted = wanted / 2**power
            assert torch.equal(states[state], wanted), (name, state)
            file = torch.load(universal / "zero" / name / f"{state}.pt", weights_only=False)
            assert torch.equal(file["param"].reshape(wanted.shape), wanted), (name, state)


@pytest.mark.parametrize(("kind", "stage"), [("mixtral", 3), ("qwen3_moe", 2)])
def test_a_grown_width_keeps_the_loss_of_such_a_model(kind: str, stage: int, tmp_path: Path) -> None:
    small = tiny.config_of(kind)
    wide = {"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 20}
    large = tiny.config_of(kind, **wide, **({"moe_intermediate_size": 18} if kind == "qwen3_moe" else {}))
    write(tmp_path, small=small, large=large)
    case = Case("run", stage, steps=2, hf=small)
    before = run_ranks(saved, 2, case, tmp_path)[0]
    model = single(small)
    inputs = tiny.inputs(small)
    assert torch.allclose(model(**inputs).logits, hf_model(small)(**inputs).logits, rtol=1e-4, atol=1e-5)
    how: dict[str, Any] = {"source_config": tmp_path / "small.json", **QUIET}
    grow(tmp_path / "run", tmp_path / "grown", tmp_path / "large.json", format="zero", stage=stage, world_size=2, **how)
    after = run_ranks(resumed, 2, Case("grown", stage, steps=2, hf=large), tmp_path)[0]
    assert after == pytest.approx(before, rel=1e-5)
    found = verify(tmp_path / "run", tmp_path / "grown", source_config=tmp_path / "small.json")
    assert found.ok, found
    factors = open_source(tmp_path / "grown").manifest.factors()  # type: ignore[union-attr]
    assert factors is not None and factors.keys() == open_source(tmp_path / "grown").tensors.keys()
    one = open_growth(tmp_path / "grown", tmp_path / "large.json")  # nothing grows: what was in force still is
    again = of_growth(one)
    assert {
        one.model.source.parts(one.model.stored(name))[-1]: again.of(name) for name in one.plan.tensors
    }.items() <= (factors.items())
    assert factors[f"model.layers.1.{BLOCK[kind]}.experts.4.{MAPS[kind][0]}.weight"].lr == 0.5
    moments = [check for check in found.checks if check.name in ("exp_avg", "exp_avg_sq", "step")]
    assert len(moments) == 3
    with pytest.raises((InvalidConfig, UnsupportedGrowth), match="expert"):
        grow(tmp_path / "run", tmp_path / "ep", tmp_path / "large.json", format="zero", stage=2, world_size=2,
             expert_parallel=2, **how)  # fmt: skip


def fake(folder: Path, config: dict[str, Any], apart: str = "", frozen: str = "") -> None:
    """Universal files of such a run. apart: in names of a second optimizer group; frozen: in those without a group."""
    tensors = {name: p.detach() for name, p in single(config).named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    trained = [name for name in tensors if not (frozen and frozen in name)]
    sets = [[n for n in trained if bool(apart and apart in n) == second] for second in (False, True)]
    groups = tuple(TargetGroup("all", False, tuple(names), {"lr": 1e-3}, 7) for names in sets if names)
    spec = make_spec(shapes=shapes, aliases={}, config={}, groups=groups, group_layout="single",
                     frozen=tuple(n for n in tensors if n not in trained))  # fmt: skip
    states = {name: dict.fromkeys(spec.states, tensor) for name, tensor in tensors.items()}
    write_checkpoint(folder, spec, reader(states), format="universal", manifest_growth=None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"apart": ".experts.2."},
            r"experts\.0\.w1\.weight is in optimizer group 0, [^ ]*experts\.2\.w1\.weight is in opt",
        ),
        (
            {"frozen": ".experts.3.w2"},
            r"experts\.0\.w2\.weight is in optimizer group 0, [^ ]*experts\.3\.w2\.weight is frozen",
        ),
    ],
)
def test_experts_that_are_trained_apart_are_refused_by_name(how: dict[str, str], message: str, tmp_path: Path) -> None:
    config = tiny.config_of("mixtral")
    write(tmp_path, small=config, large=tiny.config_of("mixtral", num_hidden_layers=6))
    fake(tmp_path / "run", config, **how)
    given: dict[str, Any] = {"source_config": tmp_path / "small.json", "depth": "stack", **QUIET}
    with pytest.raises(UnsupportedGrowth, match=message):
        grow(tmp_path / "run", tmp_path / "out", tmp_path / "large.json", format="universal", **given)
    folder = grow(tmp_path / "run", tmp_path / "hub", tmp_path / "large.json", format="hub", **given)
    theirs = type(hf_model(config)).from_pretrained(folder)
    mine = hf_model(config)
    grown = dict(theirs.named_parameters())
    assert all(torch.equal(grown[n.replace("layers.2.", "layers.5.")], p) for n, p in mine.named_parameters())


def test_groups_frozen_blocks_and_folders_of_such_runs(tmp_path: Path) -> None:
    config = tiny.config_of("mixtral")
    write(tmp_path, small=config, large=tiny.config_of("mixtral", num_hidden_layers=6))
    fake(tmp_path / "run", config, frozen=".experts.", apart=".gate.")
    given: dict[str, Any] = {"source_config": tmp_path / "small.json", "depth": "stack", **QUIET}
    out = grow(tmp_path / "run", tmp_path / "out", tmp_path / "large.json", format="universal", **given)
    found = open_source(out)
    assert [all(".gate." in name for name in group["names"]) for group in found.groups] == [False, True]
    assert {name for name, meta in found.tensors.items() if not meta.trainable} == {
        name for name in found.tensors if ".experts." in name
    }
    # a folder made of such a run, which lists the run's names, grows, too
    reshard(tmp_path / "run", tmp_path / "h", format="hub", source_config=tmp_path / "small.json", say=lambda _: None)
    ours, theirs = open_model(tmp_path / "h"), hf_model(config)
    for name, p in theirs.named_parameters():
        assert torch.equal(ours.read(name, "fp32", 0, len(p)), p), name
    with pytest.raises(InvalidCheckpoint, match=r"experts are modules of their own \(first .*experts\.0\.w1\.weight"):
        bert2bert.grow(single(config), tiny.config_of("mixtral", num_hidden_layers=6), depth="stack")
