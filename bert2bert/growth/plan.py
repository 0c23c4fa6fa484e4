"""From configs and choices to the plan of a whole growth: within an architecture, back to a smaller model, from a tied
model to an untied one, or from a dense model to a mixture of experts.

Refuses (`UnsupportedGrowth`, `InvalidConfig`) what the maps cannot express, and says what would work; see `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.growth.choices import Choices
from bert2bert.growth.inverse import shrunk
from bert2bert.growth.untying import untied
from bert2bert.growth.upcycling import upcycled
from bert2bert.growth.within import within
from bert2bert.tables import table_for


def plan_growth(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    choices: Choices,
    *,
    heads: frozenset[str] | None = None,
    optimizer: bool = True,
) -> GrowthPlan:
    """Plan the growth of a model with config ``source`` into one with config ``target``.

    heads: which heads the checkpoint has (default: those of the source's class in ``architectures``). optimizer:
    whether it has moments, without which warnings and notes leave them out. Raises UnsupportedGrowth, InvalidConfig.
    """
    table = table_for(source)
    if heads is None:
        named = (source.get("architectures") or [None])[0]
        heads = table.names.classes.get(named, next(iter(table.names.classes.values())))
    if choices.embeddings:
        return untied(source, target, choices, heads, optimizer)
    if choices.shrinks:
        return shrunk(source, target, choices, heads, optimizer)
    if target.get("model_type") != table.model_type:
        return upcycled(source, target, choices, heads, optimizer)
    return within(source, target, choices, heads, optimizer)
