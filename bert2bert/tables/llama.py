"""Llama and Mistral by axis, and the rows that Qwen shares: grouped, multi-query or multi-head attention, tied or not.

Pre-RMSNorm: the norms write ``normed``, which the branches read. A key-value head's query heads are stored together, as
``kv group``. Rotary positions hold no tensor, so the context may differ, but they fix the head size.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.heads import LABELS, LLAMA_ROWS, llama_classes
from bert2bert.tables.table import Table

_ROTARY = (
    "rotary positions pair a head's features at frequencies that follow from its size; keep head_dim, grow the heads"
)

LLAMA = Table(
    model_type="llama",
    names=Names(
        prefix="model.", anchor="embed_tokens.weight", classes=llama_classes("Llama"),
        prefixes={"LlamaForQuestionAnswering": "transformer."},
        ties=(Tie("lm_head.weight", "model.embed_tokens.weight", needs="lm"),), tie_default=False,
    ),
    sizes=Sizes(
        axes={
            "vocab": "vocab_size", "embed": "hidden_size", "kv": "num_key_value_heads|num_attention_heads",
            "group": "num_attention_heads/kv", "qk": "head_dim|hidden_size/num_attention_heads", "v": "qk",
            "ffn": "intermediate_size", **LABELS, "layers": "num_hidden_layers",
        },
        constants={"tau": 1, "rho": 1, "classes": 2}, follows={"normed": "embed"}, scales={"tau": "qk"},
        units=("kv", "group", "ffn"), fixed={"qk": _ROTARY, "v": _ROTARY},
        multiples={"llama": ("hidden_size", "num_attention_heads")},
    ),
    norms=Norms(kind="rms", pre=True, eps=("rms_norm_eps", 1e-6)),
    compatible=Compatibility(
        must_agree={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "mlp_bias": False, "pad_token_id": None, "max_position_embeddings": None,
        },
        agree_when={"max_position_embeddings": ("!rope_parameters=*'default'*",)},
    ),
    rows=(
        Row("model.embed_tokens.weight", "vocab -> embed"),
        Row("model.layers.{layers}.self_attn.q_proj.weight", "(tau kv group qk) <- normed"),
        Row("model.layers.{layers}.self_attn.q_proj.bias", "(tau kv group qk)", when="attention_bias"),
        Row("model.layers.{layers}.self_attn.k_proj.weight", "(kv ~qk) <- normed"),
        Row("model.layers.{layers}.self_attn.k_proj.bias", "(kv ~qk)", when="attention_bias"),
        Row("model.layers.{layers}.self_attn.v_proj.weight", "(kv v) <- normed"),
        Row("model.layers.{layers}.self_attn.v_proj.bias", "(kv v)", when="attention_bias"),
        Row("model.layers.{layers}.self_attn.o_proj.weight", "embed <- (kv group v)"),
        Row("model.layers.{layers}.self_attn.o_proj.bias", "embed", when="attention_bias"),
        Row("model.layers.{layers}.mlp.gate_proj.weight", "ffn <- normed"),
        Row("model.layers.{layers}.mlp.gate_proj.bias", "ffn", when="mlp_bias"),
        Row("model.layers.{layers}.mlp.up_proj.weight", "ffn <- normed"),
        Row("model.layers.{layers}.mlp.up_proj.bias", "ffn", when="mlp_bias"),
        Row("model.layers.{layers}.mlp.down_proj.weight", "embed <- ffn"),
        Row("model.layers.{layers}.mlp.down_proj.bias", "embed", when="mlp_bias"),
        Row("model.layers.{layers}.input_layernorm.weight", "(rho normed)"),
        Row("model.layers.{layers}.post_attention_layernorm.weight", "(rho normed)"),
        Row("model.norm.weight", "(rho ~embed)", tied=True),
        Row("model.norm.weight", "(rho normed)", tied=False),
        Row("lm_head.weight", "vocab <- normed", needs="lm", tied=False),
        *LLAMA_ROWS,
    ),
)  # fmt: skip

MISTRAL = replace(
    LLAMA, model_type="mistral", names=replace(LLAMA.names, classes=llama_classes("Mistral"), prefixes={}),
    sizes=replace(LLAMA.sizes, axes={**LLAMA.sizes.axes, "kv": "num_key_value_heads|8"}),
    compatible=replace(
        LLAMA.compatible, must_agree={**LLAMA.compatible.must_agree, "sliding_window": 4096},
        requires={"attention_bias": False, "mlp_bias": False},
    ),
)  # fmt: skip
