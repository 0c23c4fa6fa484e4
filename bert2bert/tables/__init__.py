"""The architectures this version can grow, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.tables.bert import BERT
from bert2bert.tables.gpt2 import GPT2
from bert2bert.tables.llama import LLAMA, MISTRAL
from bert2bert.tables.modernbert import MODERNBERT
from bert2bert.tables.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from bert2bert.tables.qwen import QWEN2, QWEN3
from bert2bert.tables.roberta import ROBERTA
from bert2bert.tables.t5 import T5
from bert2bert.tables.table import Parameter, Table

TABLES = {
    table.model_type: table
    for table in (
        BERT,
        ROBERTA,
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        T5,
        MODERNBERT,
        MIXTRAL,
        QWEN3_MOE,
        QWEN2_MOE,
    )
}

__all__ = ["TABLES", "Parameter", "Table", "table_for"]


def table_for(config: Mapping[str, Any]) -> Table:
    """The table of a Hugging Face config. Raises UnsupportedGrowth for an architecture without one, InvalidConfig."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InvalidConfig(f"model config: architectures is {classes!r}; a list of class names is expected")
    if not isinstance(kind, str) or kind not in TABLES:
        raise UnsupportedGrowth(
            f"model_type {kind!r} of the config has no table; {did_you_mean(str(kind), TABLES)}\n"
            f"Only these architectures can be grown by this version."
        )
    return TABLES[kind]
