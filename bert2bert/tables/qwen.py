"""Qwen2 and Qwen3 by axis: Llama's rows with biases on queries, keys and values, or with norms on queries and keys.

Refuses sliding windows, which only some layers would have.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.tables.description import Row
from bert2bert.tables.heads import llama_classes
from bert2bert.tables.llama import LLAMA

_SHARED = tuple(row for row in LLAMA.rows if row.when != "mlp_bias")
_FFN = [row.name for row in _SHARED].index("model.layers.{layers}.mlp.gate_proj.weight")


def head_norms(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows with norms on queries and keys after them; ``iota`` marks what those norms read."""
    read = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    return (
        *(replace(r, spec=r.spec.replace("(", "(iota ", 1)) if r.name.endswith(read) else r for r in rows),
        Row("model.layers.{layers}.self_attn.q_norm.weight", "qk"),
        Row("model.layers.{layers}.self_attn.k_norm.weight", "~qk"),
    )


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    names=replace(LLAMA.names, classes=llama_classes("Qwen2"), prefixes={"Qwen2ForQuestionAnswering": "transformer."}),
    sizes=replace(LLAMA.sizes, axes={**LLAMA.sizes.axes, "kv": "num_key_value_heads|32"}),
    compatible=replace(
        LLAMA.compatible,
        requires={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
        kinds="layer_types",
    ),
    rows=tuple(replace(row, when="") for row in _SHARED if not row.name.endswith("o_proj.bias")),
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    names=replace(LLAMA.names, classes=llama_classes("Qwen3"), prefixes={"Qwen3ForQuestionAnswering": "transformer."}),
    sizes=replace(
        LLAMA.sizes,
        axes={**LLAMA.sizes.axes, "kv": "num_key_value_heads|32", "qk": "head_dim|128"},
        constants={**LLAMA.sizes.constants, "iota": 1},
    ),
    compatible=replace(
        LLAMA.compatible, requires={"mlp_bias": False, "use_sliding_window": False}, kinds="layer_types"
    ),
    rows=(*head_norms(_SHARED[:_FFN]), *_SHARED[_FFN:]),
)
