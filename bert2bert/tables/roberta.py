"""RoBERTa's tensors by axis: BERT's encoder and pooler under other names, its own masked-LM head and classifiers.

Positions count from 2, after the padding id 1, so the first two rows of the position embedding are no token's.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.tables.bert import BERT
from bert2bert.tables.description import Row, Tie
from bert2bert.tables.heads import BERT_ROWS, bert_classes

_LAYERS = tuple(replace(row, name=f"roberta.{row.name.removeprefix('bert.')}") for row in BERT.rows if row.depth)

ROBERTA = replace(
    BERT,
    model_type="roberta",
    names=replace(
        BERT.names,
        prefix="roberta.",
        classes={
            "RobertaForMaskedLM": frozenset({"lm"}),
            "RobertaModel": frozenset({"pooler"}),
            **bert_classes("Roberta", frozenset({"sequence"})),
        },
        ties=(
            Tie("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight", needs="lm"),
            Tie("lm_head.decoder.bias", "lm_head.bias", needs="lm"),
        ),
    ),
    sizes=replace(BERT.sizes, constants={"tau": 1, "rho": 1, "one": 1}, first_position=2),
    compatible=replace(
        BERT.compatible,
        must_agree={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True},
        requires={
            "is_decoder": False,
            "add_cross_attention": False,
            "pad_token_id": 1,
            "position_embedding_type": "absolute",
        },
    ),
    rows=(
        Row("roberta.embeddings.word_embeddings.weight", "vocab -> embed"),
        Row("roberta.embeddings.token_type_embeddings.weight", "types -> embed"),
        Row("roberta.embeddings.LayerNorm.weight", "(rho embed)"),
        Row("roberta.embeddings.LayerNorm.bias", "embed"),
        Row("roberta.embeddings.position_embeddings.weight", "pos -> embed"),
        *_LAYERS,
        Row("roberta.pooler.dense.{weight,bias}", "embed <- embed", needs="pooler", untrained=True),
        Row("lm_head.bias", "vocab", needs="lm"),
        Row("lm_head.dense.{weight,bias}", "embed <- embed", needs="lm"),
        Row("lm_head.layer_norm.weight", "(rho ~embed)", needs="lm", tied=True),
        Row("lm_head.layer_norm.bias", "~embed", needs="lm", tied=True),
        Row("lm_head.layer_norm.weight", "(rho embed)", needs="lm", tied=False),
        Row("lm_head.layer_norm.bias", "embed", needs="lm", tied=False),
        Row("lm_head.decoder.{weight,bias}", "vocab <- embed", needs="lm", tied=False),
        Row("classifier.dense.{weight,bias}", "embed <- embed", needs="sequence"),
        Row("classifier.out_proj.{weight,bias}", "labels <- embed", needs="sequence"),
        *BERT_ROWS,
    ),
)
