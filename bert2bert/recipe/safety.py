"""What a run does about steps that would spoil the model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bert2bert.recipe.checks import in_range, one_of


@dataclass(frozen=True)
class Safety:
    """What a run does about an optimizer step that would spoil the model.

    Such a step has a loss or a gradient norm that is not finite, or a norm above ``max_grad_norm`` (before clipping;
    None: no limit). It is never applied: weights, moments and Adam's step counts stay bit for bit as they were.
    fp16's overflows are no such steps where the loss scale is dynamic and mends them.

    ``on_divergence``: 'stop' ends the run and names its newest checkpoint; 'skip' counts the step in the metrics
    (skipped_steps) and goes on with the next rows, through at most ``max_skipped`` steps in a row.
    ``growth_loss_increase``: nats by which the held-out loss may rise at a growth inside the run; None: by what the
    growth's plan says.
    """

    on_divergence: str = "stop"
    max_skipped: int = 10
    max_grad_norm: float | None = None
    growth_loss_increase: float | None = None

    def __post_init__(self) -> None:
        one_of("safety.on_divergence", self.on_divergence, ("stop", "skip"))
        in_range("safety.max_skipped", self.max_skipped, 1)
        if self.max_grad_norm is not None:
            in_range("safety.max_grad_norm", self.max_grad_norm, 0, open_low=True)
        if self.growth_loss_increase is not None:
            in_range("safety.growth_loss_increase", self.growth_loss_increase, 0)
