"""Learning rates: end points, shapes, no jump where one schedule is cut in two phases; factors, second warm-ups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule
from bert2bert.recipe.schedules import Rates, group_rates, lr_at

WSD = {"kind": "wsd", "decay_steps": 4}
MODEL = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
         "max_position_embeddings": 8}  # fmt: skip


def rates(schedule: Schedule, steps: int, peak: float = 1.0) -> list[float]:
    return [lr_at(schedule, peak, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "wsd", "inverse_sqrt"])
def test_warm_up_rises_in_equal_parts_and_never_wastes_a_step(kind: str) -> None:
    found = rates(Schedule(kind, warmup_steps=4, decay_steps=5 if kind == "wsd" else None), 20)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert min(found) > 0


def test_linear_reaches_its_end_at_the_first_step_after_the_phase() -> None:
    schedule = Schedule("linear", final=0.2)
    assert rates(schedule, 4, peak=2.0) == pytest.approx([2.0, 1.6, 1.2, 0.8])
    assert lr_at(schedule, 2.0, 4, 4) == pytest.approx(0.4)


def test_cosine_is_half_way_in_the_middle_and_ends_at_final() -> None:
    schedule = Schedule("cosine", warmup_steps=2, final=0.5)
    assert lr_at(schedule, 1.0, 2, 12) == 1.0
    assert lr_at(schedule, 1.0, 7, 12) == pytest.approx(0.75)
    assert lr_at(schedule, 1.0, 12, 12) == pytest.approx(0.5)
    assert lr_at(schedule, 1.0, 4, 12) == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi / 5)) / 2)


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(Schedule("constant"), 7, peak=3e-4)) == {3e-4}


def theirs(make: Any, steps: int, **options: Any) -> list[float]:
    """The rates of one of transformers' schedulers, whose warm-up begins at 0 and not a step above it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = make(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_wsd_and_inverse_square_root_are_those_of_transformers_after_the_warm_up() -> None:
    wsd = Schedule("wsd", warmup_steps=3, decay_steps=8, final=0.25)
    shape = {"num_warmup_steps": 3, "num_stable_steps": 9, "num_decay_steps": 8, "min_lr_ratio": 0.25}
    expected = theirs(get_wsd_schedule, 22, **shape, decay_type="linear")
    assert [*rates(wsd, 20), *[lr_at(wsd, 1.0, 20, 20)] * 2][3:] == pytest.approx(expected[3:])
    root = theirs(get_inverse_sqrt_schedule, 30, num_warmup_steps=5)
    assert rates(Schedule("inverse_sqrt", warmup_steps=5), 30)[5:] == pytest.approx(root[5:])


def test_one_linear_schedule_cut_in_two_phases_is_the_same_schedule() -> None:
    whole = rates(Schedule("linear", warmup_steps=5), 50, peak=1e-3)
    left = 30 / 45
    first = rates(Schedule("linear", warmup_steps=5, final=left), 20, peak=1e-3)
    second = rates(Schedule("linear"), 30, peak=1e-3 * left)
    assert first + second == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [Schedule("cosine", warmup_steps=5), Schedule(warmup_steps=5, final=0.1, **WSD), Schedule("inverse_sqrt", 5)],
    ids=lambda schedule: schedule.kind,
)
def test_one_curve_over_the_run_and_a_jump_back_on_it(schedule: Schedule) -> None:
    whole, run = rates(schedule, 50), replace(schedule, of="run")
    cut = [lr_at(run, 1.0, step % 20, 20 if step < 20 else 30, step, 50) for step in range(50)]
    assert cut == whole
    assert [lr_at(replace(run, start=-18), 1.0, step, 30, 20 + step, 50) for step in range(30)] == whole[2:32]
    entered = replace(schedule, steps=50, start=8)
    assert rates(entered, 30) == whole[8:38]
    assert rates(entered, 45)[42:] == [lr_at(schedule, 1.0, 50, 50)] * 3 or schedule.kind == "inverse_sqrt"


def test_a_phase_that_is_all_warm_up_is_defined() -> None:
    assert rates(Schedule("linear", warmup_steps=3), 3) == pytest.approx([0.25, 0.5, 0.75])
    assert lr_at(Schedule("linear", warmup_steps=3), 1.0, 3, 3) == 1.0


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_phase_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="outside a phase of 10 steps"):
        lr_at(Schedule(), 1.0, step, 10)


def test_a_curve_with_an_end_needs_a_length() -> None:
    with pytest.raises(ValueError, match="'linear' needs the number of its steps"):
        lr_at(Schedule(), 1.0, 3, None)
    assert lr_at(Schedule(steps=4), 1.0, 3, None) == 0.25 and lr_at(Schedule("constant"), 1.0, 3, None) == 1.0


def test_a_phase_has_its_own_peak_or_the_optimizers() -> None:
    assert lr_at(Schedule("constant", peak=2e-4), 1e-3, 0, 1) == 2e-4
    assert lr_at(Schedule("constant"), 1e-3, 0, 1) == 1e-3


def test_a_second_warm_up_lies_on_top_of_the_curve() -> None:
    schedule = Schedule("linear", rewarm_steps=4, rewarm_peak=1.5)
    curve = rates(Schedule("linear"), 10)
    risen = [0.3, 0.6, 0.9, 1.2, *[1.5] * 6]
    assert rates(schedule, 10) == pytest.approx([a * b for a, b in zip(curve, risen, strict=True)])
    fresh = replace(schedule, rewarm="fresh")
    assert rates(fresh, 10) == curve
    for step, factor in enumerate(risen):
        plain = Rates(curve[step], 0.1, 1e-8)
        assert group_rates(fresh, plain, step) == group_rates(schedule, plain, step, fresh=True) == plain
        assert group_rates(fresh, plain, step, fresh=True) == pytest.approx((curve[step] * factor, 0.1, 1e-8))


def test_factors_are_followed_fade_out_or_are_ignored() -> None:
    plain, factors = Rates(1e-3, 0.1, 1e-6), (0.25, 4.0, 0.5)
    assert group_rates(Schedule(), plain, 3, factors) == plain
    whole = Rates(1e-3 * 0.25, 0.1 * 4.0, 1e-6 * 0.5)
    assert group_rates(Schedule(follow="source"), plain, 1000, factors) == whole
    faded = Schedule(follow="source", fade_steps=8)
    found = [group_rates(faded, plain, step, factors) for step in range(12)]
    assert found[0] == whole and set(found[8:]) == {plain}
    assert found[4] == pytest.approx((1e-3 * 0.5, 0.1 * 2.0, 1e-6 * 0.5**0.5))
    for a, b in pairwise(found[:9]):  # by equal shares
        assert b.lr / a.lr == pytest.approx(4 ** (1 / 8))
    assert group_rates(faded, plain, 0, None) == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "schedule.kind is 'cosin': did you mean 'cosine'"),
        ({"kind": "wsd"}, "schedule.decay_steps is None; expected the number of last steps that decay"),
        ({"decay_steps": 3}, "schedule.decay_steps is 3; expected none, as only kind 'wsd' has it"),
        ({"kind": "wsd", "decay_steps": 0}, "schedule.decay_steps is 0; expected a number of at least 1"),
        ({"kind": "inverse_sqrt"}, "schedule.warmup_steps is 0; expected at least 1"),
        ({"kind": "inverse_sqrt", "warmup_steps": 2, "final": 0.1}, "schedule.final is 0.1; expected 0, as kind"),
        ({"kind": "constant", "final": 0.5}, "schedule.final is 0.5; expected 0, as kind 'constant' has no end value"),
        ({"of": "runs"}, "schedule.of is 'runs': did you mean 'run'"),
        ({"start": -1}, "schedule.start is -1; expected a number of at least 0"),
        ({"start": 4}, "schedule.steps is None; expected the length of the curve, which is entered at step 4"),
        ({"steps": 0}, "schedule.steps is 0; expected a number of at least 1"),
        ({"rewarm": "new"}, "schedule.rewarm is 'new': known: all, fresh"),
        ({"rewarm_peak": 0}, "schedule.rewarm_peak is 0; expected a number above 0"),
        ({"follow": "small"}, "schedule.follow is 'small': known: ignore, source"),
        ({"fade_steps": 5}, "schedule.fade_steps is 5; expected 0, as no factors are followed"),
        ({"peak": math.inf}, "schedule.peak is inf"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Schedule(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 21}, "warmup_steps is 21, more than the phase's 20 steps, so the peak would never be"),
        ({"warmup_steps": 18, **WSD}, "warmup_steps and decay_steps are 18 and 4, more than the phase's 20 steps"),
        ({"warmup_steps": 31, "of": "run"}, "warmup_steps is 31, more than the run's 30 steps"),
        ({"warmup_steps": 9, "steps": 8}, "warmup_steps is 9, more than the curve's 8 steps"),
        ({"start": -11, "of": "run"}, "start is -11; expected at least -10, the curve's step 0"),
        ({"start": 20, "of": "run"}, "start is 20; expected less than the run's 30 steps"),
        ({"start": 90, "steps": 80}, "start is 90; expected less than the curve's 80 steps"),
        ({"rewarm_steps": 21}, "rewarm_steps is 21, more than the phase's 20 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_its_phase_is_refused_with_its_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        recipe(Schedule(**fields))
    assert "phases.1.schedule." in str(caught.value) and message in str(caught.value)


def recipe(schedule: Schedule) -> Recipe:
    return Recipe("two", MODEL, Data("bins", 8), 1, (Phase("a", 10), Phase("b", 20, schedule=schedule)), AdamW(1e-3))


def test_a_run_of_unknown_length_is_no_length() -> None:
    Schedule(of="run", steps=9).check("phases.0.schedule", None, None, None)
    Schedule("constant", of="run").check("phases.0.schedule", None, None, None)
    with pytest.raises(
        InvalidConfig, match=r"phases\.0\.schedule\.steps is None and the steps of the run are not known"
    ):
        Schedule(of="run").check("phases.0.schedule", 5, None, None)
