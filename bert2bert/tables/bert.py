"""BERT's tensors by axis: the encoder, the pooler, the masked-LM head (tied or not), the next-sentence head, others.

Post-LayerNorm: the norms renormalise the residual stream ``embed`` itself, so a width is exact only when every hidden
feature has equally many copies. The tied decoder is the word embedding, so the last norm before it writes ``~embed``.
"""

from __future__ import annotations

from bert2bert.tables.description import Compatibility, Names, Norms, Row, Sizes, Tie
from bert2bert.tables.heads import BERT_ROWS, LABELS, bert_classes
from bert2bert.tables.table import Table

BERT = Table(
    model_type="bert",
    names=Names(
        prefix="bert.",
        anchor="embeddings.word_embeddings.weight",
        classes={
            "BertForPreTraining": frozenset({"lm", "pooler", "nsp"}),
            "BertForMaskedLM": frozenset({"lm"}),
            "BertForNextSentencePrediction": frozenset({"pooler", "nsp"}),
            "BertModel": frozenset({"pooler"}),
            **bert_classes("Bert", frozenset({"pooler", "labels"})),
        },
        ties=(
            Tie("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight", needs="lm"),
            Tie("cls.predictions.decoder.bias", "cls.predictions.bias", needs="lm"),
        ),
    ),
    sizes=Sizes(
        axes={
            "vocab": "vocab_size", "pos": "max_position_embeddings", "types": "type_vocab_size|2",
            "embed": "hidden_size", "heads": "num_attention_heads", "qk": "hidden_size/heads", "v": "qk",
            "ffn": "intermediate_size", **LABELS, "layers": "num_hidden_layers",
        },
        constants={"tau": 1, "rho": 1, "classes": 2, "one": 1},
        scales={"tau": "qk"},
        units=("heads", "ffn"),
    ),
    norms=Norms(kind="layer", pre=False, eps=("layer_norm_eps", 1e-12)),
    compatible=Compatibility(
        must_agree={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True, "pad_token_id": 0},
        requires={"is_decoder": False, "add_cross_attention": False},
    ),
    rows=(
        Row("bert.embeddings.word_embeddings.weight", "vocab -> embed"),
        Row("bert.embeddings.position_embeddings.weight", "pos -> embed"),
        Row("bert.embeddings.token_type_embeddings.weight", "types -> embed"),
        Row("bert.embeddings.LayerNorm.weight", "(rho embed)"),
        Row("bert.embeddings.LayerNorm.bias", "embed"),
        Row("bert.encoder.layer.{layers}.attention.self.query.{weight,bias}", "(tau heads qk) <- embed"),
        Row("bert.encoder.layer.{layers}.attention.self.key.{weight,bias}", "(heads ~qk) <- embed"),
        Row("bert.encoder.layer.{layers}.attention.self.value.{weight,bias}", "(heads v) <- embed"),
        Row("bert.encoder.layer.{layers}.attention.output.dense.{weight,bias}", "embed <- (heads v)"),
        Row("bert.encoder.layer.{layers}.attention.output.LayerNorm.weight", "(rho embed)"),
        Row("bert.encoder.layer.{layers}.attention.output.LayerNorm.bias", "embed"),
        Row("bert.encoder.layer.{layers}.intermediate.dense.{weight,bias}", "ffn <- embed"),
        Row("bert.encoder.layer.{layers}.output.dense.{weight,bias}", "embed <- ffn"),
        Row("bert.encoder.layer.{layers}.output.LayerNorm.weight", "(rho embed)"),
        Row("bert.encoder.layer.{layers}.output.LayerNorm.bias", "embed"),
        Row("bert.pooler.dense.{weight,bias}", "embed <- embed", needs="pooler", untrained=True),
        Row("cls.predictions.bias", "vocab", needs="lm"),
        Row("cls.predictions.transform.dense.{weight,bias}", "embed <- embed", needs="lm"),
        Row("cls.predictions.transform.LayerNorm.weight", "(rho ~embed)", needs="lm", tied=True),
        Row("cls.predictions.transform.LayerNorm.bias", "~embed", needs="lm", tied=True),
        Row("cls.predictions.transform.LayerNorm.weight", "(rho embed)", needs="lm", tied=False),
        Row("cls.predictions.transform.LayerNorm.bias", "embed", needs="lm", tied=False),
        Row("cls.predictions.decoder.{weight,bias}", "vocab <- embed", needs="lm", tied=False),
        Row("cls.seq_relationship.{weight,bias}", "classes <- embed", needs="nsp", untrained=True),
        *BERT_ROWS,
    ),
)  # fmt: skip
