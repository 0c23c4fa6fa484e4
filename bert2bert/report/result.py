"""What a comparison of runs found, typed. FLOPs are counts, seconds are of training, losses are nats a predicted token.

As JSON (`Report.as_json`), the fields are the keys, in this order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bert2bert.report.curves import Boundary, Place


class CurvePoint(NamedTuple):
    """One evaluation on the held-out text; in JSON a list of these five numbers."""

    step: int
    flops: float
    seconds: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Heldout:
    """The held-out text that all runs were evaluated on."""

    digest: str | None
    """Of the token bins."""
    unigram_entropy: float | None
    """In nats a token: a model below it has learnt from context."""


@dataclass(frozen=True)
class SourceCost:
    """What a grown run was grown from."""

    name: str | None
    loss: float | None
    """The source's held-out loss at the step where it was grown."""
    loss_after: float | None
    """The grown model's, before it was trained on."""
    flops: float | None
    seconds: float | None
    within: bool = False
    """Whether the run's own numbers hold it: the run grew between two of its phases, and this is what came before."""


@dataclass(frozen=True)
class Saving:
    """1 - spent / spent by the reference; None where the source's cost is not known."""

    flops: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunEntry:
    """One run of the report."""

    name: str
    path: str
    role: str
    """'reference', 'grown' (before the run or in it), 'run', or 'source' of a grown run: shown, not compared."""
    model: str
    """Layers × width, at its end."""
    finished: bool
    world_size: int | None
    initial_loss: float | None
    """None if nothing was evaluated before the first step."""
    final_loss: float
    final_accuracy: float
    below_unigram: bool | None
    """Whether the final loss is below the unigram entropy."""
    steps: int
    tokens: float
    flops: float
    seconds: float
    reaches: Place | None
    """Where the run's curve first reaches the mark; the last four stay None for reference and sources."""
    gap: float | None
    """Its best loss less the mark, where it does not reach it."""
    saving: Saving | None
    """Of the run alone, from its first growth on."""
    saving_with_source: Saving | None
    """With the source's cost added to the run's; None for a run that was not grown."""
    curve: tuple[CurvePoint, ...]
    boundaries: tuple[Boundary, ...]
    source: SourceCost | None


@dataclass(frozen=True)
class Report:
    """A comparison of runs with the first of them."""

    mark: float
    """The reference's final held-out loss."""
    reference: str
    heldout: Heldout
    runs: tuple[RunEntry, ...]
    notes: tuple[str, ...]
    files: dict[str, str]
    """Kind ('md', 'png', 'json') -> path of what was written."""

    def as_json(self) -> dict[str, Any]:
        """As ``report --json`` prints it."""
        return asdict(self)
