"""The modules that BERT is made of, over flat tokens [T, hidden], with Hugging Face's names for every parameter.

Every parameter is read inside the module that owns it, which is what ZeRO-3 gathers by and what lets `streaming` call
one module at a time with tensors from elsewhere. Post-LN only; attention is `attention.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bert2bert.model.attention import attend
from bert2bert.model.config import BertConfig
from bert2bert.model.core import Shared
from bert2bert.model.modules import activation


class Embeddings(nn.Module):
    """Word + type + position, normalised: int64 [T] each -> [T, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        summed = self.word_embeddings(tokens) + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(summed))


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        shape = (x.shape[0], self.heads, -1)
        q, k, v = self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)
        out = attend(
            q, k, v, shared.cu_seqlens, shared.max_seqlen, self.dropout_p, self.training, shared.plan
        )  # fmt: skip
        return out.flatten(1)


class Residual(nn.Module):
    """norm(dropout(dense(x)) + residual): what writes into the residual stream."""

    def __init__(self, inputs: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Multi-head attention with its output projection and norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        return self.output(self.self(x, shared), x)


class Intermediate(nn.Module):
    """The feed-forward network's first half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Layer(nn.Module):
    """One Transformer block: [T, hidden] -> [T, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = self.attention(x, shared)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """The layers; the model calls them one by one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Pooler(nn.Module):
    """First tokens [S, hidden] -> [S, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class Backbone(nn.Module):
    """Everything below the heads: what Hugging Face calls BertModel."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        if "nsp" in config.heads:
            self.pooler = Pooler(config)


class Transform(nn.Module):
    """dense, activation, norm before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.act(self.dense(x)))


class Predictions(nn.Module):
    """The masked-LM head: [M, hidden] -> [M, vocabulary]. Bert ties it; alone, its decoder has its own tensors."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.tied = config.tie_word_embeddings
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return decoded(self, self.transform(x))


def decoded(head: Any, x: Tensor) -> Tensor:
    """Logits of a head that may be tied and keeps a `bias` beside its decoder."""
    if not head.tied and torch.is_grad_enabled():
        # Untied, Hugging Face keeps a `bias` that nothing reads. It gets a gradient of zero here: under ZeRO-3 a
        # parameter without one is stepped with the gradient of an earlier step.
        x = x + 0 * head.bias.sum()
    return head.decoder(x)


class Heads(nn.Module):
    """The pre-training heads; the model calls them one by one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)
        if "nsp" in config.heads:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)
