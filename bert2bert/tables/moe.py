"""Mixtral, Qwen3-MoE and Qwen2-MoE by axis: Llama with experts, a layer's fused into two tensors.

The router is ``experts <- normed``; all experts share one map on ``ffn``. The experts of a token are weighed by a
softmax over all of them, so their number grows only by operators that know it. ``dense``: what one expert is made of in
a dense model. Qwen2-MoE adds a shared expert, which no dense model has: it is not a target of upcycling.
Refuses dense layers between those with experts, and sliding windows in the Qwens.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.tables.description import Row
from bert2bert.tables.heads import llama_classes
from bert2bert.tables.llama import LLAMA
from bert2bert.tables.qwen import head_norms

_MLP = "model.layers.{layers}.mlp."
_ATTENTION = tuple(row for row in LLAMA.rows if ".self_attn." in row.name)
_GATE = Row(f"{_MLP}gate.weight", "experts <- normed")
_EXPERTS = (
    Row(f"{_MLP}experts.gate_up_proj", "experts (ffn | ffn) <- normed"),
    Row(f"{_MLP}experts.down_proj", "experts embed <- ffn"),
)
_DENSE = {
    f"{_MLP}experts.gate_up_proj": (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
    f"{_MLP}experts.down_proj": (f"{_MLP}down_proj.weight",),
}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}


def _rows(attention: tuple[Row, ...], *mlp: Row) -> tuple[Row, ...]:
    first, *others = (row for row in LLAMA.rows if "_proj." not in row.name)
    return (first, *attention, *mlp, *others)


MIXTRAL = replace(
    LLAMA, model_type="mixtral", names=replace(LLAMA.names, classes=llama_classes("Mixtral"), prefixes={}),
    sizes=replace(LLAMA.sizes, axes={**LLAMA.sizes.axes, "kv": "num_key_value_heads|8",
                                     "experts": "num_local_experts|num_experts|8"}),
    norms=replace(LLAMA.norms, eps=("rms_norm_eps", 1e-5)),
    compatible=replace(
        LLAMA.compatible, requires={"attention_bias": False, "mlp_bias": False}, dense=_DENSE,
        dense_types=("llama", "mistral"), must_agree={
            **LLAMA.compatible.must_agree, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2,
        },
    ),
    rows=_rows(_ATTENTION, _GATE, *_EXPERTS),
)  # fmt: skip

QWEN3_MOE = replace(
    LLAMA, model_type="qwen3_moe", names=replace(
        LLAMA.names, classes=llama_classes("Qwen3Moe"), prefixes={"Qwen3MoeForQuestionAnswering": "transformer."}),
    sizes=replace(
        LLAMA.sizes, constants={**LLAMA.sizes.constants, "iota": 1}, axes={
            **LLAMA.sizes.axes, "ffn": "moe_intermediate_size", "experts": "num_local_experts|num_experts|128"},
    ),
    compatible=replace(
        LLAMA.compatible, requires=_ALL_SPARSE, dense=_DENSE, dense_types=("qwen3",),
        must_agree={**LLAMA.compatible.must_agree, "norm_topk_prob": False, "num_experts_per_tok": 8},
    ),
    rows=_rows(head_norms(_ATTENTION), *_EXPERTS, _GATE),
)  # fmt: skip

QWEN2_MOE = replace(
    LLAMA, model_type="qwen2_moe", names=replace(LLAMA.names, classes=llama_classes("Qwen2Moe"), prefixes={}),
    sizes=replace(
        LLAMA.sizes, constants={**LLAMA.sizes.constants, "one": 1}, units=(*LLAMA.sizes.units, "shared"), axes={
            **LLAMA.sizes.axes, "ffn": "moe_intermediate_size", "shared": "shared_expert_intermediate_size",
            "experts": "num_experts|60"},
    ),
    compatible=replace(
        LLAMA.compatible, requires=_ALL_SPARSE, kinds="layer_types", must_agree={
            **LLAMA.compatible.must_agree, "norm_topk_prob": False, "qkv_bias": True, "num_experts_per_tok": 4},
    ),
    rows=_rows(
        tuple(replace(row, when=row.when and "!qkv_bias=False") for row in _ATTENTION if "o_proj.bias" not in row.name),
        _GATE, *_EXPERTS, Row(f"{_MLP}shared_expert.gate_proj.weight", "shared <- normed"),
        Row(f"{_MLP}shared_expert.up_proj.weight", "shared <- normed"),
        Row(f"{_MLP}shared_expert.down_proj.weight", "embed <- shared"),
        Row(f"{_MLP}shared_expert_gate.weight", "one <- normed"),
    ),
)  # fmt: skip
