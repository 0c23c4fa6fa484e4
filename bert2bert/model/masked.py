"""What encoder cores have in common: full attention, and a masked-LM head that sees the predicted positions only.

Refuses next-sentence labels for a model without that head (`InvalidConfig`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.core import Core, Output


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats over labels != -100 (0 when there is none), right guesses, labels: three scalars.

    logits: [N, classes], taken to float32 when they are 16-bit. labels: int64 [N].
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    predicted = (labels != IGNORE).sum()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / predicted.clamp(min=1)
    return loss, (logits.argmax(-1) == labels).sum(), predicted


class Encoder(Core):
    """A bidirectional language model with a masked-LM head, and for BERT a next-sentence head beside it."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        super().__init__(hf_config)
        self._label_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = label_loss

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """The masked-LM head: hidden states [M, hidden] of the last block -> logits [M, vocabulary]."""

    def next_sentence(self, x: Tensor, batch: Batch) -> Tensor:
        """The next-sentence logits, [S, 2], of hidden states [T, hidden]. Raises InvalidConfig without that head."""
        raise InvalidConfig(
            "the batch has next-sentence labels, but the model has no next-sentence head; "
            "expected architectures ['BertForPreTraining'] in the model config"
        )

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        x = self.encode(batch)
        pairs = self.next_sentence(x, batch) if "nsp" in self.heads else None
        return self.decode(batch.at_targets(x)), pairs

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        super().compile_layers(backend)
        self._label_loss = torch.compile(label_loss, backend=backend)

    def predict(self, x: Tensor, batch: Batch, return_logits: bool) -> Output:
        """As `Core.predict`. Raises InvalidConfig for next-sentence labels without that head."""
        pairs = None
        if batch.nsp_labels is not None or (return_logits and "nsp" in self.heads):
            pairs = self.next_sentence(x, batch)
        logits = self.decode(batch.at_targets(x))
        loss, correct, predicted = self._label_loss(logits, batch.labels)
        if batch.nsp_labels is not None and pairs is not None:
            loss = loss + label_loss(pairs, batch.nsp_labels)[0]
        return Output(loss, correct, predicted, *((logits, pairs) if return_logits else ()))
