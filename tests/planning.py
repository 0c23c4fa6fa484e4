"""Growths by the texts of a command line, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.growth import plan
from bert2bert.growth.choices import Choices


def plan_growth(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    heads: frozenset[str] | None = None,
    optimizer: bool = True,
    **texts: Any,
) -> GrowthPlan:
    """`bert2bert.growth.plan.plan_growth` with operators as texts."""
    return plan.plan_growth(source, target, Choices.parse(**texts), heads=heads, optimizer=optimizer)
