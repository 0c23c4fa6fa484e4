"""Schedules: what every optimizer group is stepped with, as pure functions of the step. Imports no torch.

Refuses (`InvalidConfig`): values out of range, fields that contradict each other, and a curve that does not fit the
steps of its phase or run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from bert2bert.errors import InvalidConfig
from bert2bert.recipe.checks import in_range, one_of, require

KINDS = ("linear", "cosine", "constant", "wsd", "inverse_sqrt")
_ENDLESS = ("constant", "inverse_sqrt")  # need no length, and have no end value


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a phase: a linear warm-up to the peak, then ``kind`` down to ``final`` x the peak.

    ``kind``: 'linear', 'cosine' (half a wave), 'constant', 'wsd' (constant, then linear over the last ``decay_steps``)
    or 'inverse_sqrt' (peak x the root of warmup_steps / step).
    ``peak``: None means optimizer.lr. ``final`` is reached at the first step after the curve, so that a next phase
    whose peak is peak x final goes on without a jump; what is past the curve's end stays there. 'constant' and
    'inverse_sqrt' have no end value and must leave it at 0.

    ``of``: 'phase', or 'run': one curve over all phases that say so, at the run's step. ``steps``: the curve's
    length; None takes the phase's, or the run's. ``start``: the step at which the curve is entered; of a run, it is
    added to the run's step and may be negative, so that the rate goes back to an earlier one (staged training's jump).

    ``rewarm_steps``: another linear warm-up from the phase's first step, a factor on the curve that rises to
    ``rewarm_peak`` and stays there; ``rewarm``: of 'all' parameters or of the 'fresh' ones, which the last growth
    inserted (SPARKLING, arXiv 2602.02472: 1.3 after 250 steps).

    ``follow``: 'source' multiplies rate, weight decay and epsilon of every parameter by the factors with which its
    growth would follow the small run; they fade out geometrically over the phase's first ``fade_steps``, 0: never.
    'ignore': none.
    """

    kind: str = "linear"
    warmup_steps: int = 0
    peak: float | None = None
    final: float = 0.0
    decay_steps: int | None = None
    of: str = "phase"
    steps: int | None = None
    start: int = 0
    rewarm_steps: int = 0
    rewarm: str = "all"
    rewarm_peak: float = 1.0
    follow: str = "ignore"
    fade_steps: int = 0

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, KINDS)
        one_of("schedule.of", self.of, ("phase", "run"))
        one_of("schedule.rewarm", self.rewarm, ("all", "fresh"))
        one_of("schedule.follow", self.follow, ("source", "ignore"))
        for key in ("warmup_steps", "rewarm_steps", "fade_steps"):
            in_range(f"schedule.{key}", getattr(self, key), 0)
        for key in ("steps", "decay_steps"):
            if getattr(self, key) is not None:
                in_range(f"schedule.{key}", getattr(self, key), 1)
        if self.peak is not None:
            in_range("schedule.peak", self.peak, 0, open_low=True)
        in_range("schedule.rewarm_peak", self.rewarm_peak, 0, open_low=True)
        in_range("schedule.final", self.final, 0, 1)
        if self.kind in _ENDLESS:
            require(self.final == 0, "schedule.final", self.final, f"0, as kind {self.kind!r} has no end value")
        if self.kind == "inverse_sqrt":
            expected = "at least 1, as the rate falls with the root of warmup_steps / step"
            require(self.warmup_steps > 0, "schedule.warmup_steps", self.warmup_steps, expected)
        decays = self.decay_steps is not None
        expected = "the number of last steps that decay" if self.kind == "wsd" else "none, as only kind 'wsd' has it"
        require(decays == (self.kind == "wsd"), "schedule.decay_steps", self.decay_steps, expected)
        if self.of == "phase":
            in_range("schedule.start", self.start, 0)
            known = self.start == 0 or self.steps is not None or self.kind in _ENDLESS
            expected = f"the length of the curve, which is entered at step {self.start}"
            require(known, "schedule.steps", self.steps, expected)
        faded = self.fade_steps == 0 or self.follow == "source"
        require(faded, "schedule.fade_steps", self.fade_steps, "0, as no factors are followed that could fade")

    def check(self, where: str, steps: float | None, run_start: int | None, run_steps: float | None) -> None:
        """Raise InvalidConfig if the schedule does not fit its phase.

        ``where``: its dotted name; ``steps``: of the phase, at most; ``run_start``: the run's step at which the phase
        begins; ``run_steps``: of the run. None: not known before; `lr_at` is then given an estimate.
        """
        of, most = f"the {self.of}'s", run_steps if self.of == "run" else steps
        if self.steps is not None:
            of, most = "the curve's", self.steps
        elif most is None and self.of == "run" and self.kind not in _ENDLESS:
            raise InvalidConfig(
                f"{where}.steps is None and the steps of the run are not known; give the curve's length"
            )
        run_start = run_start if self.of == "run" else 0
        if run_start is not None and self.start < -run_start:
            raise InvalidConfig(f"{where}.start is {self.start}; expected at least {-run_start}, the curve's step 0")
        begins = self.start + (run_start or 0)
        warmup, decay = self.warmup_steps, self.decay_steps or 0
        if most is not None and warmup + decay > most:
            what = f"warmup_steps and decay_steps are {warmup} and {decay}" if decay else f"warmup_steps is {warmup}"
            lost = "there would be no stretch at the peak" if decay else "the peak would never be reached"
            raise InvalidConfig(f"{where}.{what}, more than {of} {most:g} steps, so {lost}; lower what is too long")
        if most is not None and self.kind not in _ENDLESS and begins >= most:
            raise InvalidConfig(f"{where}.start is {self.start}; expected less than {of} {most:g} steps")
        if steps is not None and self.rewarm_steps > steps:
            raise InvalidConfig(f"{where}.rewarm_steps is {self.rewarm_steps}, more than the phase's {steps:g} steps")


class Rates(NamedTuple):
    """What an optimizer group is stepped with."""

    lr: float
    weight_decay: float
    eps: float


def lr_at(
    schedule: Schedule,
    lr: float,
    step: int,
    steps: float | None,
    run_step: int = 0,
    run_steps: float | None = None,
) -> float:
    """The learning rate, of what follows no factors and is not fresh, of the 0-based ``step`` of a phase of ``steps``.

    ``lr``: the optimizer's, the peak if the schedule has none; ``run_step``: 0-based, of the run of ``run_steps``.
    Warm-up rises in equal parts from peak/(w+1) at step 0 to the peak at step w, so no step is spent at rate 0; the end
    value, peak x final, is reached at step ``steps``, the first of the next phase. Lengths may be estimates, and None
    where the curve has its own or needs none. Raises ValueError for a step outside [0, steps].
    """
    if step < 0 or (steps is not None and step > steps):
        raise ValueError(f"step {step} is outside a phase of {steps} steps")
    whole = schedule.of == "run"
    at = max(schedule.start + (run_step if whole else step), 0)
    length = schedule.steps or (run_steps if whole else steps)
    rate = _on_curve(schedule, lr if schedule.peak is None else schedule.peak, at, length)
    return rate * rewarmed(schedule, step) if schedule.rewarm == "all" else rate


def _on_curve(schedule: Schedule, peak: float, at: float, length: float | None) -> float:
    """The curve's value at step ``at``."""
    warmup = schedule.warmup_steps
    if at < warmup:
        return peak * (at + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(warmup / at)
    if length is None:
        raise ValueError(f"a schedule of kind {schedule.kind!r} needs the number of its steps")
    begin = warmup if schedule.decay_steps is None else length - schedule.decay_steps
    progress = min(max((at - begin) / max(length - begin, 1), 0), 1)
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.final + (1 - schedule.final) * left)


def rewarmed(schedule: Schedule, step: int) -> float:
    """The factor of the second warm-up at the 0-based ``step`` of the phase."""
    return schedule.rewarm_peak * min((step + 1) / (schedule.rewarm_steps + 1), 1)


def group_rates(
    schedule: Schedule, plain: Rates, step: int, factors: tuple[float, float, float] | None = None, fresh: bool = False
) -> Rates:
    """What one optimizer group is stepped with at the 0-based ``step`` of the phase.

    ``plain``: the recipe's, with the rate of `lr_at`; ``factors``: of rate, weight decay and epsilon, as the growth
    wrote them for the group's parameters; ``fresh``: whether the last growth inserted them.
    """
    if fresh and schedule.rewarm == "fresh":
        plain = plain._replace(lr=plain.lr * rewarmed(schedule, step))
    share = followed(schedule, step)
    return plain if factors is None else Rates(*(value * f**share for value, f in zip(plain, factors, strict=True)))


def followed(schedule: Schedule, step: int) -> float:
    """The share, from 1 to 0, to which factors are obeyed at the 0-based ``step`` of the phase."""
    if schedule.follow == "ignore":
        return 0.0
    return max(1 - step / schedule.fade_steps, 0.0) if schedule.fade_steps else 1.0
