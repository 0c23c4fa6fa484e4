"""RoBERTa: BERT's blocks under other names, positions that count from behind the padding id, and a head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert2bert.model import blocks
from bert2bert.model.batch import Batch
from bert2bert.model.core import Shared
from bert2bert.model.masked import Encoder
from bert2bert.model.settings import settings_of


class Embeddings(blocks.Embeddings):
    """BERT's, but the position table comes last and its first rows, up to the padding id's, belong to no token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.position_embeddings
        rows, self.first = config.max_position_embeddings, config.pad_token_id + 1
        self.position_embeddings = nn.Embedding(rows, config.hidden_size, padding_idx=config.pad_token_id)

    def forward(self, tokens: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        return super().forward(tokens, types, positions + self.first)


class Backbone(nn.Module):
    """Everything below the head: what transformers calls RobertaModel, without its pooler."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = blocks.Encoder(config)


class Head(nn.Module):
    """The masked-LM head: [M, hidden] -> [M, vocabulary]. Roberta ties it; alone, its decoder has its own tensors."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tied = config.tie_word_embeddings
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return blocks.decoded(self, self.layer_norm(F.gelu(self.dense(x))))


class Roberta(Encoder):
    """The whole model."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = settings_of(self.hf_config)
        self.roberta = Backbone(self.config)
        self.lm_head = Head(self.config)
        if self.aliases:
            self.lm_head.decoder.weight = self.roberta.embeddings.word_embeddings.weight
            self.lm_head.decoder.bias = self.lm_head.bias

    @property
    def layers(self) -> nn.ModuleList:
        return self.roberta.encoder.layer

    def embed(self, batch: Batch) -> Tensor:
        return self.roberta.embeddings(batch.tokens, batch.types, batch.positions)

    def shared(self, x: Tensor, batch: Batch) -> Shared:
        plan = self.attention(x, batch, self.sizes["qk"], float(self.config.attention_probs_dropout_prob))
        return Shared(batch.cu_seqlens, batch.max_seqlen, plan)

    @property
    def head_path(self) -> str:
        return "lm_head.decoder"

    def decode(self, x: Tensor) -> Tensor:
        return self.lm_head(x)
