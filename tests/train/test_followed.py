"""A grown run that obeys its growth's factors follows the small run, in the trainer's engine; groups that these split
are saved, loaded and grown on by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.factors import ONE, Factors, GrowthFactors
from bert2bert.checkpoints.groups import Place, param_groups, refines
from bert2bert.checkpoints.manifest import Grown
from bert2bert.commands import phase_growth
from bert2bert.commands.cli import main
from bert2bert.errors import InvalidConfig
from bert2bert.growth.factors import factors
from bert2bert.model.registry import build
from bert2bert.recipe import AdamW, Grow, Phase, Recipe, Schedule
from bert2bert.train import partitions
from bert2bert.train.obeying import without_factors
from tests.distributed import run_ranks
from tests.laws.harness import reader, realised
from tests.planning import plan_growth
from tests.steps import whole
from tests.train import runs, test_hosted, tiny

SMALL = {**tiny.model_config(), "architectures": ["BertForMaskedLM"]}
LARGE = {**SMALL, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
ADAM = AdamW(lr=1e-2, eps=1e-4, weight_decay=0.3)
SOURCE = Schedule("constant", follow="source")
States = dict[str, dict[str, torch.Tensor]]


def engine_of(config: dict[str, Any], stage: int, found: dict[str, Factors] | None = None, **more: Any) -> Any:
    import os

    from bert2bert.train import engine as engines

    torch.manual_seed(0)
    plan = tiny.recipe(model=config, optimizer=ADAM, clip=0.0)
    return engines.build(plan, tiny.ds_config(stage, world=int(os.environ["WORLD_SIZE"])), build(config), found, **more)


def trained(engine: Any, steps: range, schedule: Schedule) -> None:
    for step in steps:
        engine.apply(whole(tiny.LAYERS))
        engine.set_rates(schedule, ADAM.lr, step - steps.start)
        for micro in range(2):
            loss, *_ = engine.forward(tiny.batch(100 * step + 10 * micro + engine.rank))
            engine.backward(loss)


def losses(engine: Any) -> torch.Tensor:
    """Of batches that nothing was trained on."""
    engine.training(False)
    with torch.no_grad():
        found = [engine.forward(tiny.batch(5000 + i))[0] for i in range(8)]
    engine.training(True)
    return torch.stack(found)


def states_of(engine: Any) -> States:
    """Whole tensors, of an engine of stage 0."""
    found: States = {state: {} for state in partitions.STATES}
    for fragment in partitions.fragments(engine):
        for state in partitions.STATES:
            held = partitions.read(engine, fragment, state)
            held = torch.zeros(fragment.stop - fragment.start) if held is None else held  # of the unused, never stepped
            found[state][fragment.name] = held.reshape(engine.shape(fragment.name)).double()
    return found


def put(engine: Any, states: States, step: int) -> None:
    """Let an engine of any stage hold these."""
    moments = {m: {s: torch.zeros_like(m.detach()) for s in partitions.MOMENTS} for _, m in partitions.masters(engine)}
    for fragment in partitions.fragments(engine):
        for state in partitions.STATES:
            into = fragment.master if state == "fp32" else moments[fragment.master][state]
            fragment.of(into).copy_(states[state][fragment.name].flatten()[fragment.start : fragment.stop])
    partitions.set_moments(engine, moments, [step] * len(engine.groups))
    partitions.publish(engine)


def followed() -> dict[str, float]:
    """How far, relative to the loss, grown runs are from the small one three steps after the growth."""
    small = engine_of(SMALL, 0)
    trained(small, range(2), Schedule("constant"))
    before = states_of(small)
    trained(small, range(2, 5), Schedule("constant"))
    expected = losses(small)
    small.destroy()
    plan = plan_growth(SMALL, LARGE, width="tile")
    large = {state: realised(plan, reader(before), state) for state in partitions.STATES}
    found = {name: f for name in plan.tensors if (f := factors(plan).of(name))}
    out = {}
    for name, stage, schedule in (
        ("source, stage 0", 0, SOURCE),
        ("source, stage 2", 2, SOURCE),
        ("source, stage 3", 3, SOURCE),
        ("faded", 0, Schedule("constant", follow="source", fade_steps=2)),
        ("ignored", 0, Schedule("constant")),
    ):
        engine = engine_of(LARGE, stage, found)
        put(engine, large, 2)
        trained(engine, range(2, 5), schedule)
        out[name] = float(((losses(engine) - expected) / expected).abs().max())
        engine.destroy()
    return out


@pytest.mark.timeout(90)
def test_a_grown_run_follows_the_small_one_by_its_factors_alone() -> None:
    for out in run_ranks(followed, 2, timeout=80):
        assert max(gap for name, gap in out.items() if name.startswith("source")) < 1e-6, out
        assert 2 * out["faded"] > out["ignored"] > 1e-2 and out["faded"] > 1e-3, out


def recipe(bins: Path, schedule: Schedule, grow: Grow | None = None) -> Recipe:
    """Two steps, two more after a growth and a last one after another, as far as there is one."""
    return runs.recipe(
        bins, model=SMALL, optimizer=ADAM, gradient_clipping=0.0, eval_every=1, checkpoint_every=1, keep_checkpoints=9,
        phases=(
            Phase("small", 2, schedule=Schedule("constant")), Phase("large", 2, schedule=schedule, grow=grow),
            Phase("larger", 1, schedule=schedule, grow=grow),
        ),
    )  # fmt: skip


def whole_runs(bins: Path, root: Path) -> None:
    """The small run, and two that grow twice: one obeys its factors and is stopped on the way, the other does not."""
    twice = Grow({"hidden_size": "2x", "num_attention_heads": "2x", "intermediate_size": "2x"}, width="tile")
    for name, plan, stage, stop in (
        ("small", recipe(bins, Schedule("constant")), 3, None),
        ("source", recipe(bins, SOURCE, twice), 1, 2),
        ("source", recipe(bins, SOURCE, twice), 3, None),
        ("ignored", recipe(bins, Schedule("constant"), twice), 3, None),
    ):
        runs.run(plan, tiny.ds_config(stage), root / name, root / name, stop, grow=phase_growth.grow)


@pytest.mark.timeout(120)
def test_a_run_that_grows_in_the_job_follows_the_run_that_does_not(tmp_path: Path) -> None:
    run_ranks(whole_runs, 2, runs.make_bins(tmp_path), tmp_path, timeout=100)

    def curve(name: str) -> list[float]:
        found = {r["step"]: r["loss"] for r in runs.records(tmp_path / name) if r["kind"] == "eval"}
        return [found[step] for step in range(6)]

    small = curve("small")
    assert curve("source") == pytest.approx(small, rel=1e-6)
    assert abs(curve("ignored")[5] / small[5] - 1) > 1e-4
    saved = {name: runs.manifest(tmp_path / name, 5) for name in ("source", "ignored")}
    assert [saved[name]["training"]["followed"] for name in ("source", "ignored")] == [1.0, 0.0]
    assert len(saved["source"]["groups"]) > len(saved["ignored"]["groups"])


def refused(bins: Path, root: Path) -> list[str]:
    said = []
    for key in ({"follow": "source"}, {"rewarm": "fresh", "rewarm_steps": 2}):
        plan = runs.recipe(bins, phases=(Phase("left out", 0), Phase("all", 4, schedule=Schedule(**key))))
        try:
            runs.run(plan, tiny.ds_config(1, world=1), root / "run")
        except InvalidConfig as error:
            said.append(str(error))
    return said


@pytest.mark.timeout(60)
def test_a_schedule_that_needs_a_growth_is_refused_without_one(tmp_path: Path) -> None:
    ((first, second),) = run_ranks(refused, 1, runs.make_bins(tmp_path), tmp_path, timeout=50)
    assert first.startswith("phases.1.schedule.follow is 'source', and what the phase starts from has no factors")
    assert second.startswith("phases.1.schedule.rewarm is 'fresh', and what the phase starts from has no layers")


def risen() -> list[tuple[str, float, float]]:
    """Part, rate and decay of every live group, and of what a checkpoint would have of it, in a second warm-up."""
    engine = engine_of(SMALL, 1, {"bert.embeddings.LayerNorm.bias": Factors(0.5, 2.0, 1.0)}, fresh=["layer.1"])
    engine.set_rates(Schedule("constant", rewarm="fresh", rewarm_steps=3, rewarm_peak=2.0, follow="source"), 8.0, 0)
    live = engine.optimizer.param_groups
    of = [engine.groups[each.group] for each in engine.cuts]
    rates = [(g.part, h["lr"], h["weight_decay"]) for g, h in zip(of, live, strict=True) if g.decay or g.factors != ONE]
    engine.thaw()
    return [*rates, *{("saved", group["lr"], group["weight_decay"]) for group in live}]


@pytest.mark.timeout(60)
def test_a_second_warm_up_of_what_a_growth_inserted() -> None:
    (found,) = run_ranks(risen, 1, timeout=50)
    assert {row for row in found if row[0] != "layer.1"} == {
        *((part, 8.0, 0.3) for part in ("embeddings", "layer.0", "layer.2", "head", "saved")),
        ("embeddings", 4.0, 0.0), ("saved", 8.0, 0.0),
    }  # fmt: skip
    assert [row for row in found if row[0] == "layer.1"] == [("layer.1", 4.0, 0.3)]


def test_what_has_no_factors_is_named() -> None:
    known = GrowthFactors(without={"c": "it is new", "x": "of another model"})
    assert without_factors(Grown(factors=known), "abc").startswith(
        "1 of 3 parameters have no factors to obey (c: it is new)"
    )
    assert without_factors(Grown(factors=known), "ab") is None and without_factors(None, "ab") is None


def halves(names: Any) -> dict[str, Factors]:
    """Factors that split every group of two or more."""
    return {name: Factors(0.5, 2.0, 0.25) for i, name in enumerate(names) if i % 2}


def run_in_pieces(bins: Path, root: Path) -> None:
    """One run whole, and again in pieces of other groups and stages; a last one that obeys its factors."""
    from bert2bert.train import engine as engines

    original = engines.build
    plan = runs.recipe(bins, gradient_clipping=0.0, eval_every=100, keep_checkpoints=9, model=tiny.model_config())
    obeying = runs.recipe(bins, phases=(Phase("all", 2),), eval_every=100)

    def split(recipe: Any, settings: Any, model: Any, *_: Any) -> Any:
        return original(recipe, settings, model, halves(model.known))

    def obeyed(recipe: Any, settings: Any, model: Any, *_: Any) -> Any:
        engine = split(recipe, settings, model)
        rates = engine.set_rates
        engine.set_rates = lambda _, lr, step: rates(SOURCE, lr, step)
        return engine

    def run(plan: Any, folder: Path, stage: int, stop: int | None, build: Any) -> None:
        engines.build = build
        runs.run(plan, tiny.ds_config(stage), folder, folder, stop)

    try:
        run(plan, root / "whole", 1, None, original)
        run(plan, root / "pieces", 1, 1, split)
        run(plan, root / "pieces", 3, 4, original)
        run(plan, root / "pieces", 0, None, split)
        run(obeying, root / "obeying", 2, None, obeyed)
    finally:
        engines.build = original


@pytest.mark.timeout(120)
def test_checkpoints_go_on_in_other_groups_and_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(run_in_pieces, 2, runs.make_bins(tmp_path), tmp_path, timeout=100)
    whole, pieces = (runs.records(tmp_path / name) for name in ("whole", "pieces"))
    for a, b in zip(whole, pieces, strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    counts = [len(runs.manifest(tmp_path / "pieces", step)["groups"]) for step in (5, 8)]
    assert counts[0] < counts[1]
    saved = runs.manifest(tmp_path / "obeying", 2)
    assert saved["group_layout"] == "layers" and len(saved["groups"]) == counts[1]
    recipes = {(0.1 if group["decay"] else 0.0, 1e-8) for group in saved["groups"]}
    assert {(g["hyper"]["weight_decay"], g["hyper"]["eps"]) for g in saved["groups"]} == recipes
    target = tmp_path / "target.json"
    target.write_text(json.dumps(LARGE))
    assert main(["grow", str(tmp_path / "obeying"), str(tmp_path / "grown"), "--config", str(target), "--lossy"]) == 0
    grown = json.loads(next((tmp_path / "grown").glob("*/bert2bert.json")).read_text())
    assert grown["group_layout"] == "layers" and len(grown["groups"]) == counts[0]
    assert {(g["hyper"]["weight_decay"], g["hyper"]["eps"]) for g in grown["groups"]} == recipes


def shared_experts(root: Path) -> list[list[float]]:
    """Losses of a mixture whose ranks share the experts, split by factors, and of one that goes on with it unsplit."""
    from bert2bert.train import engine as engines

    name, found = "mixtral", []
    plan = replace(test_hosted.recipe(name), global_batch_size=2)
    config = tiny.ds_config(2, accumulation=1, rows=2) | {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    for split in (True, False):
        model = test_hosted.model(name)
        engine = engines.build(plan, config, model, halves(model.known) if split else None)
        if split:
            test_hosted.steps(engine, name, 0, 2)
            test_hosted.write(engine, root, name, 2)
        else:
            runs.load(engine, root, plan, test_hosted.DATA)
        found.append(test_hosted.steps(engine, name, 2, 4))
        engine.destroy()
    return found


@pytest.mark.timeout(60)
def test_groups_of_shared_experts_are_split_and_go_on_unsplit(tmp_path: Path) -> None:
    for split, whole_groups in run_ranks(shared_experts, 2, tmp_path, timeout=50):
        assert whole_groups == pytest.approx(split, rel=1e-6)


def test_groups_are_split_by_factors_in_the_models_order() -> None:
    members = {n: Place("head" if n > "d" else "layer.0", True) for n in "abcde"}
    found = {"b": Factors(lr=0.5), "c": Factors(lr=0.5), "e": ONE}
    whole, split = param_groups(members, "layers"), param_groups(members, "layers", found)
    assert [group.names for group in whole] == [("a", "b", "c", "d"), ("e",)]
    assert [(group.names, group.factors.lr) for group in split] == [(("a", "d"), 1.0), (("b", "c"), 0.5), (("e",), 1.0)]
    assert refines([group.names for group in split], whole)
    assert not refines([["a", "b"], ["c"], ["d", "e"]], whole) and not refines([["a", "b", "c", "d"]], whole)
