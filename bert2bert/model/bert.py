"""BERT (post-LN): transformers' BertForPreTraining (heads "lm" and "nsp") or BertForMaskedLM ("lm")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bert2bert.model.batch import Batch
from bert2bert.model.blocks import Backbone, Heads
from bert2bert.model.config import BertConfig
from bert2bert.model.core import Shared
from bert2bert.model.masked import Encoder


class Bert(Encoder):
    """The whole model. heads: ("lm",) or ("lm", "nsp"), default the config's. Weights are torch's own draws until
    `initialise`."""

    def __init__(self, config: BertConfig, heads: tuple[str, ...] | None = None) -> None:
        config = config if heads is None else config.with_heads(heads)
        super().__init__(config.to_hf())
        self.config = config
        self.bert = Backbone(config)
        self.cls = Heads(config)
        if config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            self.cls.predictions.decoder.bias = self.cls.predictions.bias

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Bert:
        """The model of a Hugging Face config. Raises InvalidConfig."""
        return cls(BertConfig.from_hf(config))

    @property
    def layers(self) -> nn.ModuleList:
        return self.bert.encoder.layer

    def embed(self, batch: Batch) -> Tensor:
        return self.bert.embeddings(batch.tokens, batch.types, batch.positions)

    def shared(self, x: Tensor, batch: Batch) -> Shared:
        plan = self.attention(x, batch, self.sizes["qk"], self.config.attention_probs_dropout_prob)
        return Shared(batch.cu_seqlens, batch.max_seqlen, plan)

    @property
    def head_path(self) -> str:
        return "cls.predictions.decoder"

    def decode(self, x: Tensor) -> Tensor:
        return self.cls.predictions(x)

    def next_sentence(self, x: Tensor, batch: Batch) -> Tensor:
        if "nsp" not in self.heads:
            return super().next_sentence(x, batch)
        return self.cls.seq_relationship(self.bert.pooler(first_tokens(x, batch)))


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """The rows [S, hidden] of x that begin a sequence; an empty sequence (it begins behind the end) gets the last."""
    return x.index_select(0, batch.cu_seqlens[:-1].long().clamp(max=x.shape[0] - 1))
