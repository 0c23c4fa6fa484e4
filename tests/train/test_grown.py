"""Start from a grown checkpoint: every value and Adam step as written, position zero, the recipe's hyper-parameters."""

from __future__ import annotations

import functools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.checkpoints.job import STATES, TargetGroup, TargetSpec
from bert2bert.checkpoints.manifest import Grown
from bert2bert.model.bert import Bert
from bert2bert.model.config import BertConfig
from bert2bert.recipe import Phase
from tests.distributed import run_ranks
from tests.doors import write_checkpoint
from tests.train import runs, tiny

GROWTH = {"operators": {"width": "aki"}, "source_spent": {"flops": 5.0, "seconds": 6.0, "tokens": 7, "steps": 8}}
SCALER = {"dynamic": True, "cur_scale": 32.0, "cur_iter": 5, "last_overflow_iter": 2, "cur_hysteresis": 1}


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


@functools.cache
def spec(precision: str, states: tuple[str, ...] = STATES) -> TargetSpec:
    """Every group with a step of its own, as a grown sub-model run would have; hyper-parameters unlike the recipe's."""
    config = BertConfig.from_hf(tiny.model_config(0.1))
    shapes = {name: tuple(p.shape) for name, p in Bert(config).named_parameters()}
    groups = tuple(
        TargetGroup(
            g.part, g.decay, g.names, {"lr": 9.0, "weight_decay": 7.0, "betas": (0.5, 0.6), "eps": 1e-3}, 40 + i
        )
        for i, g in enumerate(param_groups(by_name(shapes, config.aliases), "layers"))
    )
    return TargetSpec(
        shapes, config.aliases, config.to_hf(), groups, "layers", precision, states,
        {"global_steps": 40, "global_samples": 320, "skipped_steps": 2},
        loss_scaler=SCALER if precision == "fp16" else None,
    )  # fmt: skip


@functools.cache
def whole(name: str, state: str) -> torch.Tensor:
    shape = spec("fp32").shapes[name]
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {state}".encode())))
    return {"fp32": drawn * 0.02, "exp_avg": drawn * 1e-3, "exp_avg_sq": drawn.square() * 1e-4}[state]


def values(name: str, state: str, start: int, stop: int) -> torch.Tensor:
    return whole(name, state)[start:stop]


def load(bins: Path, path: Path, cases: list[tuple[int, str]]) -> list[dict[str, Any]]:
    from bert2bert.train import engine as engines
    from bert2bert.train import partitions

    tiny.allow_fp16()
    world = int(os.environ["WORLD_SIZE"])
    rows = 12 if world == 3 else 8
    plan, out = runs.recipe(bins, global_batch_size=rows), []
    for stage, precision in cases:
        engine = engines.build(plan, tiny.ds_config(stage, precision, world, rows=rows), tiny.model(nsp=False))
        found = runs.load(engine, path, plan, {"digest": "", "tokenizer_digest": ""})
        worst = 0.0
        for fragment in partitions.fragments(engine):
            for state in STATES:
                held = partitions.read(engine, fragment, state)
                wanted = whole(fragment.name, state).flatten()[fragment.start : fragment.stop]
                if held is None:
                    worst = max(worst, 1.0 if "weights" not in found.kind else 0.0)
                elif not torch.equal(held, wanted):
                    worst = 1.0
        out.append(
            {
                "kind": found.kind,
                "worst": worst,
                "steps": partitions.steps(engine),
                "step": found.position.step,
                "scale": engine.loss_scale,
                "notes": "\n".join(found.notes),
                "growth": found.growth,
                "decay": {g["weight_decay"] for g in engine.optimizer.param_groups},
                "counters": engine.counters,
            }
        )
        engine.destroy()
    return out


def check(result: dict[str, Any], precision: str) -> None:
    assert result["kind"] == "growth" and result["worst"] == 0.0
    assert result["steps"] == list(range(40, 40 + len(spec("fp32").groups)))
    assert result["step"] == 0 and result["counters"]["global_steps"] == 0
    assert result["growth"] == Grown.from_json(GROWTH)
    assert result["decay"] == {0.0, 0.1} and "weight_decay was 7.0 in the checkpoint" in result["notes"]
    assert result["scale"] == (32.0 if precision == "fp16" else None)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_universal_loads_at_any_stage_and_world_size(bins: Path, tmp_path: Path, world: int) -> None:
    precision = "fp16" if world == 2 else "fp32"
    write_checkpoint(tmp_path / "grown", spec(precision), values, format="universal", manifest_growth=GROWTH)
    cases = {1: [(2, "fp32"), (0, "fp32")], 2: [(1, "fp16"), (3, "fp16")], 3: [(1, "fp32"), (3, "fp32")]}[world]
    for results in run_ranks(load, world, bins, tmp_path / "grown", cases, timeout=90):
        for result in results:
            check(result, precision)


@pytest.mark.timeout(120)
def test_native_shards_and_hub_folders(bins: Path, tmp_path: Path) -> None:
    for stage in (0, 1, 2, 3):
        target = tmp_path / f"zero{stage}"
        write_checkpoint(
            target, spec("bf16"), values, format="zero", stage=stage, world_size=2, manifest_growth=GROWTH
        )  # fmt: skip
        for results in run_ranks(load, 2, bins, target, [(stage, "bf16")], timeout=60):
            check(results[0], "bf16")
    write_checkpoint(tmp_path / "hub", spec("fp32", STATES[:1]), values, format="hub", manifest_growth=GROWTH)
    for results in run_ranks(load, 2, bins, tmp_path / "hub", [(2, "fp32")], timeout=60):
        assert results[0]["kind"] == "weights" and results[0]["worst"] == 0.0
        assert set(results[0]["steps"]) == {0} and "weights only" in results[0]["notes"]
        assert "which tokenizer the model was trained with is not recorded" in results[0]["notes"]


def load_hub(bins: Path, path: Path, digests: dict[str, str]) -> tuple[str, bool]:
    """What kind of checkpoint was taken (or the refusal), and whether all weights are those of a 16-bit file."""
    from bert2bert.errors import InvalidConfig
    from bert2bert.train import engine as engines
    from bert2bert.train import partitions

    plan = runs.recipe(bins)
    engine = engines.build(plan, tiny.ds_config(2, "fp32", 1), tiny.model(nsp=False))
    try:
        found = runs.load(engine, path, plan, digests)
    except InvalidConfig as error:
        return str(error), False
    held = {f.name: partitions.read(engine, f, "fp32") for f in partitions.fragments(engine)}
    return found.kind, all(torch.equal(held[n], whole(n, "fp32").bfloat16().float().flatten()) for n in held)


@pytest.mark.timeout(60)
def test_a_hub_folder_of_16_bit_weights_and_the_tokenizer_of_its_source(bins: Path, tmp_path: Path) -> None:
    growth = {**GROWTH, "tokenizer_digest": "mine"}
    write_checkpoint(tmp_path / "hub", spec("bf16", STATES[:1]), values, format="hub", manifest_growth=growth)
    data = {"digest": "", "tokenizer_digest": "mine"}
    assert run_ranks(load_hub, 1, bins, tmp_path / "hub", data, timeout=50) == [("weights", True)]
    (refusal, _), *_ = run_ranks(load_hub, 1, bins, tmp_path / "hub", {**data, "tokenizer_digest": "other"}, timeout=50)
    assert "digest other, that model had mine" in refusal and "--tokenizer" in refusal


def run_then_continue(bins: Path, grown: Path, output: Path) -> None:
    plan = runs.recipe(bins, phases=(Phase("all", 3),), eval_every=3, checkpoint_every=2)
    config = tiny.ds_config(2)
    runs.run(plan, config, output, resume=grown, stop_at=0)
    runs.run(plan, config, output, resume=output)


@pytest.mark.timeout(120)
def test_a_run_from_a_grown_checkpoint_keeps_its_origin(bins: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "grown", spec("fp32"), values, format="universal", manifest_growth=GROWTH)
    run_ranks(run_then_continue, 2, bins, tmp_path / "grown", tmp_path / "run", timeout=90)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert Grown.from_json(about["source"]["growth"]) == Grown.from_json(GROWTH)
    assert about["source"]["spent"] == GROWTH["source_spent"]
    assert about["source"]["path"] == str(tmp_path / "grown")
    manifest = runs.manifest(tmp_path / "run", 3)
    assert Grown.from_json(manifest["growth"]) == Grown.from_json(GROWTH)
    assert manifest["training"]["spent"]["steps"] == 3
    assert manifest["groups"][0]["step"] == 43  # Adam counts on from the source's 40
    records = runs.records(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
