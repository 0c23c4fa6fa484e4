"""ModernBERT's tensors by axis: rotary positions, fused QKV and fused gated feed-forward, alternating attention.

The embeddings' norm writes the residual stream ``embed`` itself (a gain ``(rho embed)``, as in post-norm models), and
the head's norm follows an activation: both keep even copies, so widths are exact at equal counts, and neither keeps
padded features, so no padding is exact here. Inside the layers it is pre-norm, with ``normed`` read by the branches;
layer 0 has no norm before its attention, which reads ``embed``. A layer is global or local by `layer_types`.
"""

from __future__ import annotations

from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.heads import LABELS, after_norm, bert_classes
from bert2bert.tables.table import Table

_L = "model.layers.{layers}."
_QKV, _LATER = "(tau heads qk | heads ~qk | heads v)", (1, None)
_ANY = "lm|labels|choice"
_ROTARY = "rotary positions pair a head's features at frequencies that follow from its size; grow the heads"
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
}
MODERNBERT = Table(
    model_type="modernbert",
    names=Names(
        prefix="model.", anchor="embeddings.tok_embeddings.weight",
        classes={
            "ModernBertForMaskedLM": frozenset({"lm"}), "ModernBertModel": frozenset(),
            **bert_classes("ModernBert", frozenset({"labels"})),
            "ModernBertForQuestionAnswering": frozenset({"labels"}),
            "ModernBertForMultipleChoice": frozenset({"choice"}),
        },
        ties=(Tie("decoder.weight", "model.embeddings.tok_embeddings.weight", needs="lm"),),
    ),
    sizes=Sizes(
        axes={
            "vocab": "vocab_size", "embed": "hidden_size", "heads": "num_attention_heads", "qk": "hidden_size/heads",
            "v": "qk", "ffn": "intermediate_size", "layers": "num_hidden_layers", **LABELS,
        },
        constants={"tau": 1, "rho": 1, "one": 1}, follows={"normed": "embed"}, scales={"tau": "qk"},
        units=("heads", "ffn"), fixed={"qk": _ROTARY, "v": _ROTARY}, shallowest=1,
    ),
    norms=Norms(kind="layer", pre=True, eps=("norm_eps", 1e-5)),
    compatible=Compatibility(
        must_agree={
            "hidden_activation": "gelu", "classifier_activation": "gelu", "norm_eps": 1e-5, "norm_bias": False,
            "attention_bias": False, "mlp_bias": False, "classifier_bias": False, "decoder_bias": True,
            "tie_word_embeddings": True, "local_attention": 128, "rope_parameters": _ROPE,
            "max_position_embeddings": None, "pad_token_id": 50283, "classifier_pooling": "cls",
        },
        agree_when={
            "classifier_pooling": ("heads=*labels*", "heads=*choice*"),
            "max_position_embeddings": ("rope_parameters=*'rope_type': '[!d]*", "rope_parameters=*'dynamic'*"),
        },
        kinds="layer_types", every=("global_attn_every_n_layers", 3),
    ),
    stds=dict.fromkeys(("attn.Wo.weight", "mlp.Wo.weight", "head.dense.weight", "decoder.weight"), "range 2 layers"),
    rows=(
        Row("model.embeddings.tok_embeddings.weight", "vocab -> embed"),
        Row("model.embeddings.norm.weight", "(rho embed)"),
        Row("model.embeddings.norm.bias", "embed", when="norm_bias"),
        Row(f"{_L}attn_norm.weight", "(rho normed)", only=_LATER),
        Row(f"{_L}attn_norm.bias", "normed", when="norm_bias", only=_LATER),
        Row(f"{_L}attn.Wqkv.weight", f"{_QKV} <- embed", only=(0, 1)),
        Row(f"{_L}attn.Wqkv.weight", f"{_QKV} <- normed", only=_LATER),
        Row(f"{_L}attn.Wqkv.bias", _QKV, when="attention_bias"),
        Row(f"{_L}attn.Wo.weight", "embed <- (heads v)"),
        Row(f"{_L}attn.Wo.bias", "embed", when="attention_bias"),
        Row(f"{_L}mlp_norm.weight", "(rho normed)"),
        Row(f"{_L}mlp_norm.bias", "normed", when="norm_bias"),
        Row(f"{_L}mlp.Wi.weight", "(ffn | ffn) <- normed"),
        Row(f"{_L}mlp.Wi.bias", "(ffn | ffn)", when="mlp_bias"),
        Row(f"{_L}mlp.Wo.weight", "embed <- ffn"),
        Row(f"{_L}mlp.Wo.bias", "embed", when="mlp_bias"),
        Row("model.final_norm.weight", "(rho normed)"),
        Row("model.final_norm.bias", "normed", when="norm_bias"),
        Row("head.dense.weight", "embed <- normed", needs=_ANY),
        Row("head.dense.bias", "embed", needs=_ANY, when="classifier_bias"),
        Row("head.norm.weight", "(rho ~embed)", needs="lm", tied=True),
        Row("head.norm.bias", "~embed", needs="lm", tied=True, when="norm_bias"),
        Row("head.norm.weight", "(rho normed)", needs=_ANY, tied=False),
        Row("head.norm.bias", "normed", needs=_ANY, tied=False, when="norm_bias"),
        Row("decoder.weight", "vocab <- normed", needs="lm", tied=False),
        Row("decoder.bias", "vocab", needs="lm", when="!decoder_bias=False"),
        *after_norm("classifier.{weight,bias}", "labels", "labels"),
        *after_norm("classifier.{weight,bias}", "one", "choice"),
    ),
)  # fmt: skip
