"""The architectures this version can grow, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.errors import UnsupportedGrowth, did_you_mean
from bert2bert.tables.base import Parameter, Table
from bert2bert.tables.bert import BERT

TABLES = {table.model_type: table for table in (BERT,)}

__all__ = ["TABLES", "Parameter", "Table", "table_for"]


def table_for(config: Mapping[str, Any]) -> Table:
    """The table of a Hugging Face config. Raises UnsupportedGrowth for an architecture without one."""
    kind = config.get("model_type")
    if kind not in TABLES:
        raise UnsupportedGrowth(
            f"model_type {kind!r} of the config has no table; {did_you_mean(str(kind), TABLES)}\n"
            f"Only these architectures can be grown by this version."
        )
    return TABLES[kind]
