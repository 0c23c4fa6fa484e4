"""The optimizer of a run: AdamW whose parameter groups can rest for a step, and which can refuse a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FreezableAdamW(torch.optim.AdamW):
    """torch's AdamW that skips every group marked ``frozen``: no update, no decay, no moments, no step count.

    ``accepts``: asked at every call, of which ZeRO makes one a group or sub-group; on no, nothing is changed at all.
    None accepts everything.
    """

    accepts: Callable[[], bool] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.accepts is not None and not self.accepts():
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("frozen", False)]
        try:
            # ZeRO steps one group at a time, the others' lists empty: an all-frozen call must not reach the kernel
            return super().step(closure) if any(group["params"] for group in self.param_groups) else None
        finally:
            self.param_groups = groups
