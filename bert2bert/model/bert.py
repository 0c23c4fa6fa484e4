"""BERT (post-LN): transformers' BertForPreTraining (heads "mlm" and "nsp") or BertForMaskedLM ("mlm").

The masked-LM head sees the predicted positions only. Refuses next-sentence labels for a model without that head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.blocks import Backbone, Heads
from bert2bert.model.config import BertConfig
from bert2bert.model.core import Core, Output, Shared


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats over labels != -100 (0 when there is none), right guesses, labels: three scalars.

    logits: [N, classes], taken to float32 when they are 16-bit. labels: int64 [N].
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    predicted = (labels != IGNORE).sum()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / predicted.clamp(min=1)
    return loss, (logits.argmax(-1) == labels).sum(), predicted


def outcome(
    batch: Batch,
    logits: Tensor,
    nsp_logits: Tensor | None,
    keep: bool,
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = label_loss,
) -> Output:
    """What a forward returns, from its logits (shapes: Output). keep: whether the logits are part of it."""
    loss, correct, predicted = loss_of(logits, batch.labels)
    if batch.nsp_labels is not None and nsp_logits is not None:
        loss = loss + label_loss(nsp_logits, batch.nsp_labels)[0]
    return Output(loss, correct, predicted, logits if keep else None, nsp_logits if keep else None)


class Bert(Core):
    """The whole model. heads: ("mlm",) or ("mlm", "nsp"), default the config's. Weights are torch's own draws until
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
        self._label_loss = label_loss

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
        config = self.config
        padding = self.attention(x, batch, config.head_size, config.attention_probs_dropout_prob)
        return Shared(batch.cu_seqlens, batch.max_seqlen, padding)

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        super().compile_layers(backend)
        self._label_loss = torch.compile(label_loss, backend=backend)

    def predict(self, x: Tensor, batch: Batch, return_logits: bool) -> Output:
        """As `Core.predict`. Raises InvalidConfig for next-sentence labels without that head."""
        if batch.nsp_labels is not None and "nsp" not in self.config.heads:
            raise InvalidConfig(
                "the batch has next-sentence labels, but the model has no next-sentence head; "
                "expected architectures ['BertForPreTraining'] in the model config"
            )
        logits = self.cls.predictions(batch.at_targets(x))
        nsp_logits = None
        if "nsp" in self.config.heads and (return_logits or batch.nsp_labels is not None):
            nsp_logits = self.cls.seq_relationship(self.bert.pooler(first_tokens(x, batch)))
        return outcome(batch, logits, nsp_logits, return_logits, self._label_loss)


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """The rows [S, hidden] of x that begin a sequence; an empty sequence (it begins behind the end) gets the last."""
    return x.index_select(0, batch.cu_seqlens[:-1].long().clamp(max=x.shape[0] - 1))
