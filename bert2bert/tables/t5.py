"""T5's tensors by axis: encoder and decoder, each with its own depth, cross-attention, plain and gated feed-forward.

Pre-RMSNorm. The encoder's last norm writes ``normed``, which the keys and values of the cross-attention read too. The
first block of a stack holds the relative position bias of all its blocks, by head, so heads have one map in all layers.
Scores are not divided by √head size, so there is no ``tau``. Before a head whose input is divided by √width (the first
T5's, not 1.1's) the last norm has ``sigma``. transformers ties the head, unless a checkpoint stores another one:
``tie_word_embeddings`` tells it only whether that division is made.
"""

from __future__ import annotations

from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.heads import LABELS
from bert2bert.tables.table import Table

_E, _D, _BIAS = "encoder.block.{layers}.layer", "decoder.block.{decoder_layers}.layer", "relative_attention_bias.weight"
_LAST, _SCALED, _BUCKETS = "decoder.final_layer_norm.weight", "scale_decoder_outputs", "relative_attention_num_buckets"
_GATED = "feed_forward_proj=gated-*"


def _attention(block: str, name: str, needs: str = "") -> tuple[Row, ...]:
    specs = {"q": "(heads qk) <- normed", "k": "(heads ~qk) <- normed", "v": "(heads v) <- normed"}
    specs["o"] = "embed <- (heads v)"
    rows = [Row(f"{block}.{name}.{part}.weight", spec, needs) for part, spec in specs.items()]
    if name == "SelfAttention":
        rows.append(Row(f"{block}.{name}.{_BIAS}", "buckets -> heads", needs, only=(0, 1), decay=False))
    return (*rows, Row(f"{block}.layer_norm.weight", "(rho normed)", needs))


def _ffn(block: str, needs: str = "") -> tuple[Row, ...]:
    names = {"wi": f"!{_GATED}", "wi_0": _GATED, "wi_1": _GATED}
    rows = [Row(f"{block}.DenseReluDense.{n}.weight", "ffn <- normed", needs, when=when) for n, when in names.items()]
    rows.append(Row(f"{block}.DenseReluDense.wo.weight", "embed <- ffn", needs))
    return (*rows, Row(f"{block}.layer_norm.weight", "(rho normed)", needs))


T5 = Table(
    model_type="t5",
    names=Names(
        prefix="", anchor="shared.weight", untie=_SCALED,
        classes={"T5ForConditionalGeneration": frozenset({"decoder", "lm"}), "T5Model": frozenset({"decoder"}),
                 "T5EncoderModel": frozenset(), "T5ForSequenceClassification": frozenset({"decoder", "sequence"}),
                 "T5ForTokenClassification": frozenset({"labels"}),
                 "T5ForQuestionAnswering": frozenset({"decoder", "qa"})},
        prefixes=dict.fromkeys(("T5ForSequenceClassification", "T5ForTokenClassification"), "transformer."),
        ties=(Tie("encoder.embed_tokens.weight", "shared.weight", tied=None),
              Tie("decoder.embed_tokens.weight", "shared.weight", "decoder", tied=None),
              Tie("lm_head.weight", "shared.weight", "lm")),
        ignores={"": (f"{_D.replace('{decoder_layers}', '*')}.1.EncDecAttention.{_BIAS}",),  # before transformers 4
                 "T5EncoderModel": ("decoder.*", "lm_head.*")},
    ),
    sizes=Sizes(
        axes={"vocab": "vocab_size", "buckets": f"{_BUCKETS}|32", "embed": "d_model", "heads": "num_heads",
              "qk": "d_kv", "v": "qk", "ffn": "d_ff", "layers": "num_layers",
              "decoder_layers": "num_decoder_layers|num_layers", **LABELS},
        constants={"rho": 1, "sigma": 1}, follows={"normed": "embed"}, depth=("layers", "decoder_layers"),
        scales={"sigma": "embed"}, units=("heads", "ffn"), aligned=frozenset({"heads"}),
        fixed={"buckets": f"its positions are ranges of distances; keep {_BUCKETS}"},
    ),
    norms=Norms(kind="rms", pre=True, eps=("layer_norm_epsilon", 1e-6)),
    compatible=Compatibility(
        must_agree={"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True,
                    "pad_token_id": 0, _SCALED: "=tie_word_embeddings", "relative_attention_max_distance": 128,
                    "eos_token_id": 1, "decoder_start_token_id": None},
        agree_when={"eos_token_id": ("heads=*sequence*",),
                    "decoder_start_token_id": ("heads=*sequence*", "heads=*qa*")},
    ),
    stds={".q.weight": "embed qk", ".k.weight": "embed", ".v.weight": "embed", ".o.weight": "heads qk",
          ".wi.weight": "embed", ".wi_0.weight": "embed", ".wi_1.weight": "embed", ".wo.weight": "ffn", _BIAS: "embed",
          "shared.weight": "", "lm_head.weight": ""},
    rows=(
        Row("shared.weight", "vocab -> embed"),
        *_attention(f"{_E}.0", "SelfAttention"),
        *_ffn(f"{_E}.1"),
        Row("encoder.final_layer_norm.weight", "(rho normed)"),
        *_attention(f"{_D}.0", "SelfAttention", "decoder"),
        *_attention(f"{_D}.1", "EncDecAttention", "decoder"),
        *_ffn(f"{_D}.2", "decoder"),
        Row(_LAST, "(rho normed)", "decoder !lm"),
        Row(_LAST, "(rho sigma ~embed)", "decoder lm", tied=True, when=f"!{_SCALED}=False"),
        Row(_LAST, "(rho ~embed)", "decoder lm", tied=True, when=f"{_SCALED}=False"),
        Row(_LAST, "(rho sigma normed)", "decoder lm", tied=False, when=_SCALED),
        Row(_LAST, "(rho normed)", "decoder lm", tied=False, when=f"!{_SCALED}"),
        Row("lm_head.weight", "vocab <- normed", "lm", tied=False),
        Row("classification_head.dense.{weight,bias}", "embed <- normed", "sequence"),
        Row("classification_head.out_proj.{weight,bias}", "labels <- embed", "sequence"),
        Row("classifier.{weight,bias}", "labels <- normed", "labels"),
        Row("qa_outputs.{weight,bias}", "labels <- normed", "qa"),
    ),
)  # fmt: skip
