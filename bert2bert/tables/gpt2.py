"""GPT-2's tensors by axis: Conv1D layout [in, out], the fused query, key and value, and the head, tied or not.

Pre-LayerNorm: the norms write ``normed``, which the branches read; a tied head reads through the word embedding, so the
final norm before it writes ``~embed``. Refuses cross-attention, and scores that are not divided by √head size alone.
"""

from __future__ import annotations

from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.heads import LABELS, after_norm
from bert2bert.tables.table import Table

GPT2 = Table(
    model_type="gpt2",
    names=Names(
        prefix="transformer.",
        anchor="wte.weight",
        classes={
            "GPT2LMHeadModel": frozenset({"lm"}),
            "GPT2Model": frozenset(),
            "GPT2ForSequenceClassification": frozenset({"score"}),
            "GPT2ForTokenClassification": frozenset({"labels"}),
            "GPT2ForQuestionAnswering": frozenset({"qa"}),
        },
        ties=(Tie("lm_head.weight", "transformer.wte.weight", needs="lm"),),
    ),
    sizes=Sizes(
        axes={
            "vocab": "vocab_size", "pos": "n_positions", "embed": "n_embd", "heads": "n_head", "qk": "n_embd/heads",
            "v": "qk", "ffn": "n_inner|n_embd*4", **LABELS, "layers": "n_layer",
        },
        constants={"tau": 1, "rho": 1, "classes": 2},
        follows={"normed": "embed"},
        scales={"tau": "qk"},
        units=("heads", "ffn"),
    ),
    norms=Norms(kind="layer", pre=True, eps=("layer_norm_epsilon", 1e-5)),
    compatible=Compatibility(
        must_agree={
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        agree_when={"pad_token_id": ("heads=*score*",)},
        requires={"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    stds={"c_proj.weight": "range 2 layers"},
    rows=(
        Row("transformer.wte.weight", "vocab -> embed"),
        Row("transformer.wpe.weight", "pos -> embed"),
        Row("transformer.h.{layers}.ln_1.weight", "(rho normed)"),
        Row("transformer.h.{layers}.ln_1.bias", "normed"),
        Row("transformer.h.{layers}.attn.c_attn.{weight,bias}", "normed -> (tau heads qk | heads ~qk | heads v)"),
        Row("transformer.h.{layers}.attn.c_proj.{weight,bias}", "(heads v) -> embed"),
        Row("transformer.h.{layers}.ln_2.weight", "(rho normed)"),
        Row("transformer.h.{layers}.ln_2.bias", "normed"),
        Row("transformer.h.{layers}.mlp.c_fc.{weight,bias}", "normed -> ffn"),
        Row("transformer.h.{layers}.mlp.c_proj.{weight,bias}", "ffn -> embed"),
        Row("transformer.ln_f.weight", "(rho ~embed)", tied=True),
        Row("transformer.ln_f.bias", "~embed", tied=True),
        Row("transformer.ln_f.weight", "(rho normed)", tied=False),
        Row("transformer.ln_f.bias", "normed", tied=False),
        Row("lm_head.weight", "vocab <- normed", needs="lm", tied=False),
        *after_norm("score.weight", "labels", "score"),
        *after_norm("classifier.{weight,bias}", "labels", "labels"),
        *after_norm("qa_outputs.{weight,bias}", "classes", "qa"),
    ),
)  # fmt: skip
