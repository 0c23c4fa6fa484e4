"""A step that would spoil the model changes nothing at any ZeRO stage and precision, and the run stops or goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.errors import InvalidConfig, UserError
from bert2bert.model.program import Step
from bert2bert.recipe import Phase, Recipe, Safety
from bert2bert.train import partitions
from bert2bert.train.safety import Watch
from tests.distributed import run_ranks
from tests.steps import some, whole
from tests.train import runs, tiny
from tests.train.test_freeze import snapshot

LIMIT = 50.0
TOP = some((0, 1, 2), (2,), False)
GOOD = [(whole(tiny.LAYERS), 0), (TOP, 1), (whole(tiny.LAYERS), 2)]
SPOILT = {
    "nan": lambda loss, rank: loss * math.nan if rank else loss,  # one rank alone
    "infinite": lambda loss, rank: loss + math.inf if rank == 0 else loss,  # with a finite gradient
    "steep": lambda loss, rank: loss * 1e4,
}


def step(engine: Any, program: Step, seed: int, spoil: Any = None) -> None:
    engine.apply(program)
    for micro in range(2):
        loss, *_ = engine.forward(tiny.batch(100 * seed + 10 * micro + engine.rank), program)
        engine.backward(spoil(loss, engine.rank) if spoil and micro else loss)


def train(stage: int, precision: str, spoilt: bool) -> tuple[dict[str, torch.Tensor], list[int], list[Any]]:
    """The state after three good steps, between which others were spoilt; Adam's steps; what was not as it should."""
    from bert2bert.train import engine as engines

    tiny.allow_fp16()
    plan = tiny.recipe(safety=Safety("skip", max_grad_norm=LIMIT))
    engine = engines.build(plan, tiny.ds_config(stage, precision), tiny.model())
    engine.set_lr(1e-2)
    odd: list[Any] = []
    skipped = 0
    for program, seed in GOOD:
        for name, spoil in SPOILT.items() if spoilt else ():
            before = snapshot(engine)
            step(engine, whole(tiny.LAYERS), 7, spoil)
            skipped += 1
            after = snapshot(engine)
            odd += [(seed, name, key) for key, value in after.items() if not torch.equal(value, before[key])]
            finite = name == "steep" and (precision != "fp16" or engine.grad_norm < math.inf)
            norm = engine.grad_norm is not None and (engine.grad_norm > LIMIT) and (engine.grad_norm < math.inf)
            overflow = precision == "fp16" and not finite
            odd += [(seed, name, engine.grad_norm)] if norm != finite else []
            right = engine.step_skipped and engine.diverged != overflow
            odd += [(seed, name, "reported")] if not right else []
            odd += [(seed, name, engine.counters)] if engine.counters["skipped_steps"] != skipped else []
        before = snapshot(engine)
        step(engine, program, seed)
        odd += [(seed, "good", "skipped")] if engine.step_skipped or engine.diverged else []
        odd += [(seed, "good", "rests")] if all(torch.equal(v, before[k]) for k, v in snapshot(engine).items()) else []
    state, steps = snapshot(engine), partitions.steps(engine)
    engine.destroy()
    return state, steps, odd


def compared(precision: str) -> list[Any]:
    """What differs, at each stage, from a run that never saw the spoilt steps."""
    odd: list[Any] = []
    for stage in range(4):
        (alone, counts, _), (state, steps, wrong) = (train(stage, precision, spoilt) for spoilt in (False, True))
        odd += [(stage, *each) for each in wrong]
        if precision != "fp16":  # whose loss scale has moved
            odd += [(stage, key) for key in alone if not torch.equal(alone[key], state[key])]
        odd += [(stage, counts, steps)] if counts != steps else []
    return odd


@pytest.mark.timeout(120)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_spoilt_step_changes_nothing_and_the_next_goes_on_as_if_it_had_not_been(precision: str) -> None:
    assert run_ranks(compared, 2, precision, timeout=110) == [[], []]


def with_a_fixed_scale() -> list[tuple[bool, bool]]:
    from bert2bert.train import engine as engines

    tiny.allow_fp16()
    found = []
    for stage in range(4):
        config = tiny.ds_config(stage, "fp16", world=1)
        config["fp16"] = {"enabled": True, "loss_scale": 128}
        engine = engines.build(tiny.recipe(), config, tiny.model())
        for spoil in (SPOILT["infinite"], None):
            step(engine, whole(tiny.LAYERS), 0, spoil)
            found.append((engine.step_skipped, engine.diverged))
        engine.destroy()
    return found


@pytest.mark.timeout(60)
def test_a_fixed_loss_scale_mends_no_overflow() -> None:
    assert run_ranks(with_a_fixed_scale, 1, timeout=50) == [[(True, True), (False, False)] * 4]


def spoilt_runs(bins: Path, root: Path) -> dict[str, Any]:
    """Runs in which the gradient of some steps is a million times too steep, under each policy."""
    from bert2bert.train.engine import Engine

    original, out = Engine.forward, {}
    spoil = {3, 4, 6}

    def forward(self: Any, batch: Any, program: Any = None) -> Any:
        loss, *rest = original(self, batch, program)
        return (loss * 1e6 if self.model.training and self.ds.global_steps in spoil else loss, *rest)

    def run(name: str, safety: Safety, plan: Recipe, stage: int, resume: bool = False) -> None:
        folder = root / name
        try:
            runs.run(replace(plan, safety=safety), tiny.ds_config(stage), folder, folder if resume else None)
        except UserError as error:
            out[name] = str(error)

    Engine.forward = forward
    try:
        plan = runs.recipe(bins, phases=(Phase("all", 8),), checkpoint_every=2)
        limit = {"max_grad_norm": 1e3}
        run("stop", Safety(**limit), plan, 1)
        run("skip", Safety("skip", **limit), plan, 2)
        run("often", Safety("skip", max_skipped=1, **limit), plan, 3)
        spoil.clear()
        run("often", Safety("skip", max_skipped=1, **limit), plan, 3, resume=True)
    finally:
        Engine.forward = original
    return out


@pytest.mark.timeout(90)
def test_a_run_stops_or_skips(tmp_path: Path) -> None:
    for out in run_ranks(spoilt_runs, 2, runs.make_bins(tmp_path), tmp_path, timeout=80):
        assert out.keys() == {"stop", "often"}
        assert "above safety.max_grad_norm, 1000, (loss " in out["stop"] and "in step 4 (phase 'all')" in out["stop"]
        assert "The newest checkpoint is of step 2; continue with --resume" in out["stop"]
        assert "in step 5 (phase 'all'), after 1 skipped steps in a row, the most of safety.max" in out["often"]
        assert "The newest checkpoint is of step 4; continue" in out["often"]
    trained = [r for r in runs.records(tmp_path / "skip") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in trained] == [0, 0, 0, 1, 2, 2, 3, 3]
    last = runs.manifest(tmp_path / "skip", 8)
    assert last["counters"]["skipped_steps"] == 3
    assert {g["step"] for g in last["groups"] if g["part"] != "unused"} == {5}
    again = [r for r in runs.records(tmp_path / "often") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in again] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_only_steps_in_a_row_count() -> None:
    watch = Watch(Safety("skip", max_skipped=2))
    for applied in (False, False, True, False, False):
        said = watch.after(applied, math.nan, math.inf, "step 9", str)
        assert said == ("" if applied else "step 9 was skipped: the loss is nan")
    with pytest.raises(UserError, match=r"the gradient's norm is inf \(loss 1\.5\) in step 10, after 2 skipped steps"):
        watch.after(False, 1.5, math.inf, "step 10", str)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_divergence": "skp"}, "safety.on_divergence is 'skp': did you mean 'skip'"),
        ({"max_skipped": 0}, "safety.max_skipped is 0; expected a number of at least 1"),
        ({"max_grad_norm": 0.0}, "safety.max_grad_norm is 0.0; expected a number above 0"),
        ({"growth_loss_increase": -0.1}, "safety.growth_loss_increase is -0.1; expected a number of at least 0"),
    ],
)
def test_policies_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Safety(**fields)
    assert message in str(caught.value)
