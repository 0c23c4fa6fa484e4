"""When a phase ends: after so many tokens, FLOPs or epochs, when the held-out loss flattens, or when layers disagree.

A trigger is a frozen dataclass with a field `kind` and a method `done`, which says from what the phase has done
(`Stretch`) which share of it is done. It decides from numbers that every rank has and that a checkpoint records, so a
resumed run ends its phases where the run that was never stopped does. A recipe file may define its own
(docs/how-to/add-a-trigger.md). Refuses (`InvalidConfig`) settings out of range. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import foreign
from bert2bert.recipe.checks import require


class HeldOut(NamedTuple):
    """An evaluation on held-out text. flops: what the run had spent by then; loss: nats a predicted token."""

    flops: float
    loss: float


@dataclass(frozen=True)
class Stretch:
    """What a phase has done so far."""

    steps: int
    """Optimizer steps."""
    run_steps: int
    """Of the whole run."""
    tokens: int
    flops: float
    epochs: float
    """Rows of the phase by the rows of an epoch."""
    held_out: Sequence[HeldOut] = ()
    """Of its evaluations, in order."""
    correlations: Sequence[Sequence[float]] = ()
    """Of the gradients of neighbouring layers, at each check, see `train.agreement`."""


class Trigger(Protocol):
    """What `Phase.until` takes: an instance of a frozen dataclass with these. It says when a phase ends, besides its
    ``steps``. kind: a field that no constructor takes (init=False); its default names the class in JSON."""

    @property
    def kind(self) -> str: ...

    counted: ClassVar[bool]
    """Whether the share that is done grows with every step, so that a schedule can follow it."""

    def done(self, phase: Stretch) -> float:
        """The share of the phase that is done, asked after every step; from 1 on, the phase ends."""


def _positive(what: str, value: float, most: float = math.inf) -> None:
    if not 0 < value <= most or not math.isfinite(value):
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise InvalidConfig(f"until.{what} is {value!r}; expected a number above 0{limit}")


@dataclass(frozen=True)
class Tokens:
    """Ends after so many tokens of text, special tokens included."""

    tokens: float
    kind: str = field(default="tokens", init=False)
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("tokens", self.tokens)

    def done(self, phase: Stretch) -> float:
        return phase.tokens / self.tokens


@dataclass(frozen=True)
class Flops:
    """Ends after so many FLOPs, forward and backward."""

    flops: float
    kind: str = field(default="flops", init=False)
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("flops", self.flops)

    def done(self, phase: Stretch) -> float:
        return phase.flops / self.flops


@dataclass(frozen=True)
class Epochs:
    """Ends after so many passes over the training text."""

    epochs: float
    kind: str = field(default="epochs", init=False)
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("epochs", self.epochs)

    def done(self, phase: Stretch) -> float:
        return phase.epochs / self.epochs


@dataclass(frozen=True)
class RunSteps:
    """Ends at a step of the run, whatever the phases before it took."""

    steps: int
    kind: str = field(default="run-steps", init=False)
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("steps", self.steps)

    def done(self, phase: Stretch) -> float:
        return phase.steps / max(phase.steps + self.steps - phase.run_steps, 1)


@dataclass(frozen=True)
class Plateau:
    """Ends when the held-out loss falls too slowly: its slope against all FLOPs of the run so far, both as logarithms,
    fitted over the last ``evaluations`` of the phase, is flatter than ``slope`` (Shen et al. 2022, arXiv 2203.06211:
    0.052 where more training of this size is no longer worth its FLOPs, 0.0575 before a growth in depth, 0.0475 in
    width, 0.03 in both)."""

    slope: float = 0.052
    evaluations: int = 5
    kind: str = field(default="plateau", init=False)
    counted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive("slope", self.slope)
        if self.evaluations < 2:
            raise InvalidConfig(f"until.evaluations is {self.evaluations}; expected at least 2, to fit a slope")

    def done(self, phase: Stretch) -> float:
        last = [e for e in phase.held_out if e.flops > 0][-self.evaluations :]
        if len(last) < self.evaluations:
            return 0.0
        x, y = [math.log(e.flops) for e in last], [math.log(e.loss) for e in last]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        falls = -sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return 1.0 if falls < self.slope * sum((a - mean_x) ** 2 for a in x) else 0.0


@dataclass(frozen=True)
class Agreement:
    """Ends when layers that share their weights want different things: of the correlations of neighbouring layers'
    gradients, more than ``share`` are below ``threshold`` at ``patience`` checks in a row, one every ``every`` steps
    (SWE-A of Yang et al. 2021, arXiv 2110.03848; with a share of 0 a single pair is enough, as in their SWE-M)."""

    threshold: float = 0.5
    every: int = 1000
    patience: int = 3
    share: float = 0.5
    kind: str = field(default="agreement", init=False)
    counted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what, value in (("every", self.every), ("patience", self.patience)):
            if value < 1:
                raise InvalidConfig(f"until.{what} is {value}; expected at least 1")
        if not -1 < self.threshold < 1:
            raise InvalidConfig(f"until.threshold is {self.threshold!r}; expected a correlation between -1 and 1")
        if not 0 <= self.share < 1:
            raise InvalidConfig(f"until.share is {self.share!r}; expected a share of the pairs, from 0 to below 1")

    def done(self, phase: Stretch) -> float:
        last = phase.correlations[-self.patience :]
        apart = [sum(c < self.threshold for c in found) > self.share * len(found) for found in last]
        return 1.0 if len(apart) == self.patience and all(apart) else 0.0


TRIGGERS = (Tokens, Flops, Epochs, RunSteps, Plateau, Agreement)
"""Those of this project."""

FOREIGN: dict[str, type] = {}
"""Those that recipe files define, by kind: known as soon as a phase has one."""

AnyTrigger = Annotated[Tokens | Flops | Epochs | RunSteps | Plateau | Agreement | None, FOREIGN]


def admit(trigger: Any) -> None:
    """Let a phase have a trigger that a recipe file defines. Raises InvalidConfig for what is none."""
    if foreign.admit("phase.until", trigger, TRIGGERS, FOREIGN, ("done",)):
        what = f"phase.until is {trigger!r}; its"
        counted = getattr(trigger, "counted", None)
        require(isinstance(counted, bool), f"{what} counted", counted, "counted: ClassVar[bool] = True or False")
        share = trigger.done(Stretch(steps=1, run_steps=1, tokens=1, flops=1.0, epochs=0.0))
        right = isinstance(share, int | float) and not math.isnan(share)
        require(right, f"{what} done after one step", share, "the share of the phase that is done, a number")
