"""Steps that were not applied, as a recipe's `Safety` wants them: the run stops, or goes on and counts them.

Refuses (`UserError`) to go on where the recipe says stop, and after too many such steps in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bert2bert.errors import UserError
from bert2bert.recipe import Safety

_REMEDY = "Lower the learning rate, lengthen the warm-up, or set gradient_clipping."


class Watch:
    """What is decided after each optimizer step. ``in_a_row``: steps up to the last one that were not applied."""

    def __init__(self, safety: Safety, in_a_row: int = 0) -> None:
        self.safety, self.in_a_row = safety, in_a_row

    def after(self, applied: bool, loss: float, norm: float | None, where: str, newest: Callable[[], str]) -> str:
        """A sentence on a step that was not applied, empty for one that was.

        ``loss``, ``norm``: the step's, over all ranks; ``where``: the step; ``newest``: gives a sentence on the newest
        checkpoint and how to continue from it. Raises UserError where the run has to stop.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied:
            return ""
        what, most = self._what(loss, norm), self.safety.max_skipped
        if self.safety.on_divergence == "stop":
            raise UserError(f"{what} in {where}: training diverged. The step was not applied. {_REMEDY} {newest()}")
        if self.in_a_row > most:
            raise UserError(
                f"{what} in {where}, after {most} skipped steps in a row, the most of safety.max_skipped: training "
                f"diverged. {_REMEDY} {newest()}"
            )
        return f"{where} was skipped: {what}"

    def _what(self, loss: float, norm: float | None) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        what = f"the gradient's norm is {norm}"
        if norm is not None and math.isfinite(norm):
            what = f"the gradient's norm is {norm:.4g}, above safety.max_grad_norm, {self.safety.max_grad_norm:g},"
        return f"{what} (loss {loss:.4g})"
