"""What all engines of one run share: the recipe, the data, the folder and its lock, and what was measured last."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert2bert.data.bins import TokenBins
from bert2bert.files.lock import Lock
from bert2bert.ranks import distributed, stopping
from bert2bert.recipe import Recipe
from bert2bert.train.metrics import MetricsWriter


@dataclass
class Job:
    """What all engines of a run share."""

    recipe: Recipe
    bins: TokenBins
    output: Path
    stop: stopping.Stop
    lock: Lock
    quiet: bool
    until: str | None
    """The phase after which the run pauses."""
    report: Sequence[str] = ("tensorboard",)
    """Names of `reporters`."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Lines about the machines, for the head of the log."""
    metrics: MetricsWriter | None = None
    saved: int = -1
    """The step of the newest checkpoint."""
    loss: float | None = None
    """Of the last step that this process made."""
    result: dict[str, float] | None = None
    """Of the last evaluation."""
    before: float | None = None
    """The held-out loss before the model grew."""
    at: Path | None = None
    """The checkpoint of where the run stands."""

    def say(self, text: str) -> None:
        """Print on rank 0, unless only warnings are to be printed."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print on rank 0."""
        if distributed.RANKS.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def newest(self) -> str:
        """A sentence: which checkpoint is the newest, and how to continue from it."""
        if self.saved < 0:
            return "No checkpoint was written yet; the same command starts again"
        return f"The newest checkpoint is of step {self.saved}; continue with --resume {self.output}"

    @property
    def data(self) -> dict[str, Any]:
        """What the manifest says of the data."""
        return {"digest": self.bins.digest, "tokenizer_digest": self.bins.tokenizer_digest}
