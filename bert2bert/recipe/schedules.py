"""Learning rate as a pure function of the step within a phase. Imports no torch."""

from __future__ import annotations

import math

from bert2bert.recipe import Schedule


def lr_at(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The learning rate of the 0-based ``step`` of a phase of ``steps`` optimizer steps.

    ``peak`` is the phase's (schedule.peak, else optimizer.lr). Warm-up rises in equal parts from peak/(w+1) at step 0
    to the peak at step w, so no step is spent at rate 0; the end value, peak x final, is reached at step ``steps``, the
    first of the next phase. Raises ValueError for a step outside [0, steps].
    """
    if not 0 <= step <= steps:
        raise ValueError(f"step {step} is outside a phase of {steps} steps")
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup) / max(steps - warmup, 1)
    left = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.final + (1 - schedule.final) * left)


def peak_of(schedule: Schedule, lr: float) -> float:
    """The peak of a phase: its own, else the optimizer's ``lr``."""
    return lr if schedule.peak is None else schedule.peak
