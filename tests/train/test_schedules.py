"""Learning rates: end points, shapes, and no jump where one schedule is cut into two phases."""

from __future__ import annotations

import math

import pytest

from bert2bert.recipe import Schedule
from bert2bert.recipe.schedules import lr_at, peak_of


def rates(schedule: Schedule, steps: int, peak: float = 1.0) -> list[float]:
    return [lr_at(schedule, peak, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_warm_up_rises_in_equal_parts_and_never_wastes_a_step(kind: str) -> None:
    found = rates(Schedule(kind, warmup_steps=4), 20)
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


def test_one_linear_schedule_cut_in_two_phases_is_the_same_schedule() -> None:
    whole = rates(Schedule("linear", warmup_steps=5), 50, peak=1e-3)
    left = 30 / 45
    first = rates(Schedule("linear", warmup_steps=5, final=left), 20, peak=1e-3)
    second = rates(Schedule("linear"), 30, peak=1e-3 * left)
    assert first + second == pytest.approx(whole, rel=1e-12)


def test_a_phase_that_is_all_warm_up_is_defined() -> None:
    assert rates(Schedule("linear", warmup_steps=3), 3) == pytest.approx([0.25, 0.5, 0.75])
    assert lr_at(Schedule("linear", warmup_steps=3), 1.0, 3, 3) == 1.0


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_phase_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="outside a phase of 10 steps"):
        lr_at(Schedule(), 1.0, step, 10)


def test_a_phase_has_its_own_peak_or_the_optimizers() -> None:
    assert peak_of(Schedule(peak=2e-4), 1e-3) == 2e-4
    assert peak_of(Schedule(), 1e-3) == 1e-3
