"""T5 and the mixtures on real ranks: they learn as in plain torch, are saved, and go on at any stage and world size.

Mixtures with and without ranks that share their experts (DeepSpeed's AutoEP).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert.commands import cli
from bert2bert.errors import InvalidConfig
from bert2bert.model import registry
from bert2bert.model.batch import Batch
from bert2bert.model.program import Step, full
from bert2bert.recipe import Phase, Recipe, SubModels
from bert2bert.train import partitions
from bert2bert.train.position import Position
from tests import tiny as models
from tests.distributed import run_ranks
from tests.model.test_cores import asked
from tests.rounding import ROUNDING, gap
from tests.steps import some
from tests.train import runs as whole_runs
from tests.train import tiny
from tests.train.test_architectures import counting, model_of, recipe_of

LR, DECAY, CLIP = 1e-2, 0.1, 1.0
DATA = {"digest": "0", "tokenizer_digest": "0"}
_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": models.config_of("t5"),
    "t5-untied": models.config_of("t5-untied"),
    "mixtral": models.config_of("mixtral", num_local_experts=4, **_BALANCED),
    "qwen2_moe": models.config_of("qwen2_moe", num_experts=4, **_BALANCED),
    "qwen3_moe": models.config_of(
        "qwen3_moe", hidden_size=16, moe_intermediate_size=8, num_local_experts=4, **_BALANCED
    ),
}


def recipe(name: str) -> Recipe:
    return tiny.recipe(model=CONFIGS[name], clip=CLIP)


def batch(name: str, step: int, rank: int) -> Batch:
    """The second rank reads one token over and over: most of its experts get none."""
    found = asked(name, seed=step % 2)
    if rank:
        found.tokens = torch.full_like(found.tokens, 3)
        found.labels = torch.where(found.labels == -100, found.labels, 3)
    return found


def program(name: str, step: int, parts: Sequence[str]) -> Step:
    """All layers; in one step of a mixture two of them, the lower one at rest."""
    return some((0, 1), (1,), False) if step == 5 and not name.startswith("t5") else full(parts)


def model(name: str) -> Any:
    torch.manual_seed(1)
    return registry.build(CONFIGS[name])


def steps(engine: Any, name: str, first: int, last: int) -> list[float]:
    """Mean losses of optimizer steps on both batches of each: one a rank, both of one rank, or each of two ranks."""
    losses = []
    engine.set_lr(LR)
    for step in range(first, last):
        found, run = 0.0, program(name, step, engine.model.parts)
        engine.apply(run)
        for micro in range(engine.accumulation):
            loss, *_ = engine.forward(batch(name, step, (engine.rank + micro) % 2), run)
            engine.backward(loss)
            found += float(loss.detach())
        losses.append(sum(engine.sum([found])) / engine.world / engine.accumulation)
    return losses


def held(engine: Any) -> dict[str, Any]:
    return {
        f"{f.name} {state} {f.start}": partitions.read(engine, f, state).clone().numpy()
        for f in partitions.fragments(engine)
        for state in partitions.STATES
    }


def write(engine: Any, folder: Path, name: str, step: int) -> None:
    from bert2bert.train.save import save

    save(
        engine, folder, Position(step, 0, step, 8 * step), model=engine.model.hf_config,
        aliases=engine.model.aliases, recipe=recipe(name).to_dict(), data=DATA, growth=None, keep=2,
        check=lambda: None,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An engine. experts: ranks that share them; None: every rank has all. start: what its weights come from."""

    name: str
    stage: int
    precision: str = "fp32"
    world: int = 2
    experts: int | None = None
    start: Path | None = None

    def __str__(self) -> str:
        return "-".join(str(value) for value in astuple(self)[:5])

    def build(self) -> Any:
        from bert2bert.train import engine as engines

        config = tiny.ds_config(self.stage, self.precision, world=self.world, accumulation=max(2 // self.world, 1))
        if self.experts:
            config["expert_parallel"] = {"enabled": True, "autoep_size": self.experts}
        engine = engines.build(recipe(self.name), config, model(self.name))
        if self.start:
            whole_runs.load(engine, self.start, recipe(self.name), DATA)
        return engine


def train(cases: list[Case], root: Path) -> list[dict[str, Any]]:
    """Losses and weights of each; and once more from a checkpoint in the middle."""
    tiny.allow_fp16()
    found = []
    for case in cases:
        engine = case.build()
        losses = steps(engine, case.name, 0, 3)
        write(engine, root / str(case), case.name, 3)
        losses += steps(engine, case.name, 3, 6)
        whole = held(engine)
        engine.destroy()
        if case.precision != "fp32":
            found.append({"losses": losses})
            continue
        other = replace(case, start=root / str(case)).build()
        again = steps(other, case.name, 3, 6)
        same = all((value == whole[key]).all() for key, value in held(other).items())
        found.append({"losses": losses, "again": again, "same": same})
        other.destroy()
    return found


def resume(cases: list[Case]) -> list[list[float]]:
    found = []
    for case in cases:
        engine = case.build()
        found.append(steps(engine, case.name, 3, 6))
        engine.destroy()
    return found


def reference(name: str) -> list[float]:
    """Plain torch in one process."""
    core = model(name)
    named = dict(core.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": DECAY if core.known[n].decay else 0.0} for n, p in named.items()], lr=LR
    )
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        run = program(name, step, core.parts)
        loss = (core(batch(name, step, 0), run).loss + core(batch(name, step, 1), run).loss) / 2
        loss.backward()
        assert {core.known[n].part for n, p in named.items() if p.grad is not None} <= run.learn
        torch.nn.utils.clip_grad_norm_(core.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


CASES = [
    *[Case("mixtral", stage) for stage in (0, 3)],
    *[Case("t5", stage) for stage in (1, 3)],
    Case("t5-untied", 2),
    Case("qwen2_moe", 3),
    *[Case(name, stage, "bf16") for name, stage in (("t5", 2), ("mixtral", 3))],
    Case("mixtral", 2, experts=2),
    Case("qwen2_moe", 1, experts=2),
    Case("qwen3_moe", 1, "bf16", experts=2),
    Case("mixtral", 2, "fp16", experts=2),
]
ELSEWHERE = [  # from, to
    (Case("mixtral", 3), Case("mixtral", 1, world=1)),
    (Case("t5", 1), Case("t5", 3, world=1)),
    (Case("qwen2_moe", 3), Case("qwen2_moe", 0, world=1)),
    (Case("mixtral", 2, experts=2), Case("mixtral", 3, world=1)),
    (Case("qwen2_moe", 1, experts=2), Case("qwen2_moe", 2, world=1)),
    (Case("mixtral", 2, experts=2), Case("mixtral", 1, world=4, experts=2)),
    (Case("mixtral", 3), Case("mixtral", 2, world=4, experts=4)),
]
Runs = tuple[Path, dict[Case, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("hosted")
    ranks = run_ranks(train, 2, CASES, root, timeout=240)
    return root, {case: [rank[i] for rank in ranks] for i, case in enumerate(CASES)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_learns_as_in_torch_and_resumes(case: Case, runs: Runs) -> None:
    """Experts that get no token of a rank neither stop it nor change anything, wherever they are."""
    expected = reference(case.name)
    assert expected[-1] < 0.9 * expected[0]
    for rank in runs[1][case]:
        if case.precision == "fp32":
            assert gap(rank["losses"], expected) <= ROUNDING
            assert rank["again"] == rank["losses"][3:] and rank["same"]
        else:
            assert rank["losses"] == pytest.approx(expected, rel=2e-2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 4])
def test_it_goes_on_elsewhere(world: int, runs: Runs) -> None:
    """At another stage, on other ranks, with the experts shared, or no longer."""
    root, found = runs
    ways = [(one, replace(other, start=root / str(one))) for one, other in ELSEWHERE if other.world == world]
    for rank in run_ranks(resume, world, [case for _, case in ways], timeout=120):
        for (before, case), losses in zip(ways, rank, strict=True):
            assert gap(losses, found[before][0]["losses"][3:]) <= ROUNDING, case


def upcycled(bins: Path, root: Path) -> None:
    """A straight run from the grown checkpoint, and one that is stopped and resumed."""
    config = tiny.ds_config(2) | {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    plan = recipe_of(bins, None)
    for name, stop in (("straight", None), ("stopped", 2)):
        whole_runs.run(plan, config, root / name, resume=root / "grown", stop_at=stop)
    whole_runs.run(plan, config, root / "stopped", resume=root / "stopped")


@pytest.mark.timeout(180)
def test_a_dense_model_is_upcycled_into_experts_that_ranks_share(tmp_path: Path) -> None:
    """Grown into native files for such an engine, trained, stopped, resumed; the whole experts come out again."""
    bins = counting(tmp_path / "bins")
    dense, mixture = model_of("llama"), model_of("mixtral")
    kept = {key: dense[key] for key in ("rms_norm_eps", "rope_parameters", "hidden_size", "intermediate_size")}
    mixture |= {"num_local_experts": 4, "output_router_logits": True, **kept}
    models.build(dense).float().save_pretrained(tmp_path / "dense")
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    how = ["--config", str(tmp_path / "mixture.json"), "--experts", "upcycle", "--lossy", "--no-measure"]
    files = ["--format", "zero", "--stage", "2", "--world-size", "2", "--expert-parallel", "2", "--groups", "layers"]
    assert cli.main(["grow", str(tmp_path / "dense"), str(tmp_path / "grown"), *how, *files]) == 0
    assert list((tmp_path / "grown").rglob("layer_2_expert_3_*"))
    run_ranks(upcycled, 2, bins, tmp_path, timeout=150)
    records = whole_runs.records(tmp_path / "straight")
    held_out = [record["loss"] for record in records if record["kind"] == "eval"]
    assert held_out[-1] < held_out[0]
    one, other = (whole_runs.manifest(tmp_path / name, 4) for name in ("straight", "stopped"))
    assert one["tensors"] == other["tensors"] and one["expert_parallel"] == 2
    assert records == whole_runs.records(tmp_path / "stopped")
    assert cli.main(["reshard", str(tmp_path / "straight"), str(tmp_path / "hub"), "--format", "hub"]) == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert dict(found.named_parameters())["model.layers.2.mlp.experts.gate_up_proj"].shape == (4, 20, 12)


def test_a_t5_is_trained_whole() -> None:
    with pytest.raises(InvalidConfig, match=r"phases.0.program .'sub-models'.: it runs the layers .* 2 stacks"):
        tiny.recipe(model=CONFIGS["t5"], phases=(Phase("a", 4, SubModels(1)),))
