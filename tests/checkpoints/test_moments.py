"""Other optimizers than Adam: Muon's and Lion's momentum carried between real engines, what is unknown named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.job import TargetGroup
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.optimizers import ADAM, moment_keys, unknown
from bert2bert.checkpoints.source import STATES, Source
from bert2bert.errors import InvalidConfig
from tests.checkpoints.engines import Case, ds_config, release, tiny_bert, train
from tests.checkpoints.targets import make_spec
from tests.distributed import run_ranks
from tests.doors import write_checkpoint
from tests.rounding import ROUNDING, gap, unit

STAGES = {0: {}, 1: {}, 2: {}, 3: {"reduce_scatter": False}}
MOMENTUM = {"exp_avg": "momentum_buffer"}


class Lion(torch.optim.Optimizer):
    """Lion's rule and states, in torch alone (DeepSpeed has no kernel for the CPU)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                a, b = group["betas"]
                p.add_(mean.mul(a).add(p.grad, alpha=1 - a).sign(), alpha=-group["lr"])
                mean.mul_(b).add_(p.grad, alpha=1 - b)


def case_of(kind: str, stage: int) -> Case:
    return Case(f"{kind}{stage}", stage, zero=STAGES[stage], layout="decay")


def build(kind: str, stage: int) -> Any:
    import deepspeed
    import torch._dynamo

    torch._dynamo.config.disable = True  # Muon compiles
    model = tiny_bert()
    named = dict(model.named_parameters())
    wide = [n for n, p in named.items() if p.dim() > 1 and "embeddings" not in n]
    halves = [wide, [n for n in named if n not in wide]]
    if kind == "muon":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        for name, p in named.items():
            p.use_muon = name in wide
        groups = [
            {"params": [named[n] for n in names], "use_muon": not half, "lr": 0.02, "weight_decay": 0.0}
            | ({"momentum": 0.9} if not half else {"betas": (0.9, 0.98), "eps": 1e-6})
            for half, names in enumerate(halves)
        ]
        optimizer = MuonWithAuxAdam(groups)
    else:
        optimizer = Lion([{"params": [named[n] for n in ns]} for ns in halves], {"lr": 1e-2, "betas": (0.9, 0.98)})
    config = {k: v for k, v in ds_config(case_of(kind, stage)).items() if k != "scheduler"}
    config["gradient_clipping"] = 0.0  # stage 0 clips Muon's gradients, the others its updates
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.group_names = halves
    return engine


def save(folder: str, kind: str, stages: list[int]) -> list[list[float]]:
    """Train and save; then the losses of three more steps."""
    losses = []
    for stage in stages:
        engine, case = build(kind, stage), case_of(kind, stage)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{stage}")
        losses.append(train(engine, case, 3, start=3))
        release(engine)
    return losses


def go_on(folder: str, kind: str, stages: list[int]) -> list[list[float]]:
    losses = []
    for stage in stages:
        engine, case = build(kind, stage), case_of(kind, stage)
        path, _ = engine.load_checkpoint(f"{folder}/to{stage}")
        assert path is not None
        losses.append(train(engine, case, 3, start=3))
        release(engine)
    return losses


def rewrite(source: Source, target: Path, **how: Any) -> Path:
    """The same values in another layout."""
    groups = tuple(
        TargetGroup(
            f"group.{g}", False, tuple(group["names"]), {k: v for k, v in group.items() if k != "names"},
            source.step(group["names"][0]), source.moments[g],
        ) for g, group in enumerate(source.groups)
    )  # fmt: skip
    spec = replace(make_spec(), groups=groups, counters=source.counters, lr_scheduler=None, client_state={})
    return write_checkpoint(target, spec, source.read, manifest_growth=None, **how)


@pytest.mark.parametrize(("kind", "origins"), [("muon", [0, 2, 3]), ("lion", [1])])
def test_momentum_goes_on_at_any_stage(tmp_path: Path, kind: str, origins: list[int]) -> None:
    """From each stage to all: live engines go on with the same losses, which a momentum out of place would change."""
    straight = run_ranks(save, 2, str(tmp_path), kind, origins, timeout=120)[0]
    for origin, losses in zip(origins, straight, strict=True):
        source = open_source(tmp_path / str(origin))
        assert source.states == STATES and not source.other_states
        assert source.moments == ([MOMENTUM, ADAM] if kind == "muon" else [{"exp_avg": "exp_avg"}] * 2)
        kept = ["fp32", "momentum_buffer", "exp_avg", "exp_avg_sq"] if kind == "muon" else ["fp32", "exp_avg"]
        assert source.kept == kept
        name = source.groups[0]["names"][-1]
        assert source.read(name, "exp_avg", 0, 1).any() and not source.read(name, "exp_avg_sq", 0, 1).any()
        targets = list(STAGES) if origin == origins[0] else [1]
        for stage in targets:
            (tmp_path / f"from{origin}").mkdir(exist_ok=True)
            place = tmp_path / f"from{origin}" / f"to{stage}"
            folder = rewrite(source, place, format="zero", stage=stage, world_size=2)
            again = open_source(folder)
            assert again.moments == source.moments
            for tensor, meta in source.tensors.items():
                want = source.read(tensor, "exp_avg", 0, meta.shape[0])
                assert torch.equal(again.read(tensor, "exp_avg", 0, meta.shape[0]), want), tensor
        for found in run_ranks(go_on, 2, str(tmp_path / f"from{origin}"), kind, targets, timeout=120)[0]:
            # Muon makes its updates orthogonal in bfloat16, and a loss feels some of that rounding
            limit = unit(torch.bfloat16) / 8 * max(losses) if kind == "muon" else None
            assert gap(found, losses, limit) <= ROUNDING, (origin, found, losses)
    with pytest.raises(InvalidConfig, match=r"universal holds Adam's two moments, and the optimizer of .* keeps"):
        rewrite(source, tmp_path / "universal", format="universal")


def test_which_states_are_known() -> None:
    assert moment_keys({"exp_avg", "exp_avg_sq"}) == ADAM and moment_keys(set()) == {}
    assert moment_keys({"momentum_buffer"}) == MOMENTUM and moment_keys({"exp_avg"}) == {"exp_avg": "exp_avg"}
    for other in ({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"exp_avg_sq_row", "exp_avg_sq_col"}, {"sum"}):
        assert moment_keys(other) is None
    assert unknown([{"exp_avg", "exp_avg_sq"}, {"exp_avg"}]) == ()
    assert unknown([{"exp_avg"}, {"sum"}]) == ("exp_avg", "sum")
