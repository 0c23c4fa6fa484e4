"""What decoder cores have in common: causal attention, and a head that predicts the next token at every place.

The head's product with the vocabulary and its cross-entropy are computed in chunks of tokens, forward and backward
together, so no [tokens, vocabulary] tensor exists at any time. Its gradients are made in the forward pass, as sums over
tokens (in float32 for the weight of a 16-bit model) and scaled in the backward pass, so that fp16 loss scaling reaches
them in full.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bert2bert.model.attention import CAUSAL
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.core import Core, Output

CHUNK = 1 << 24
"""Logits held at a time."""


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of logits x Wᵀ over labels != -100 (0 where there is none), labels with the
    largest logit, labels.

    x: [N, hidden]; weight: [vocabulary, hidden]; labels: int64 [N]; chunk: logits held at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        count = (labels != IGNORE).sum()
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        loss = torch.zeros((), dtype=wide, device=x.device)
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), step := max(1, chunk // len(weight))):
            part, answers = x[start : start + step], labels[start : start + step]
            logs = (part @ weight.T).to(wide).log_softmax(-1)
            kept, place = answers != IGNORE, answers.clamp(min=0)[:, None]
            of_label = logs.gather(1, place)[:, 0]
            loss -= (of_label * kept).sum()
            right += ((of_label == logs.amax(-1)) & kept).sum()  # an argmax takes several times as long
            if for_x is None and for_weight is None:
                continue
            slope = logs.exp_().scatter_add_(1, place, logs.new_full(place.shape, -1.0))
            slope = slope.mul_(kept[:, None]).to(x.dtype)
            if for_x is not None:
                for_x[start : start + step] = slope @ weight
            if for_weight is not None:
                for_weight += slope.T @ part
        ctx.save_for_backward(for_x, for_weight, count.clamp(min=1))
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(right, count)
        return loss / count.clamp(min=1), right, count

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, count = ctx.saved_tensors
        scale = slopes[0] / count
        for_x = None if for_x is None else (for_x * scale).to(for_x.dtype)
        return for_x, None if for_weight is None else (for_weight * scale).to(ctx.dtype), None, None


class Head(nn.Linear):
    """[N, hidden] -> logits [N, vocabulary]; with labels, (loss, right guesses, predictions): `LinearCrossEntropy`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape[1], shape[0], bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(x) if labels is None else LinearCrossEntropy.apply(x, self.weight, labels, CHUNK)


class Decoder(Core):
    """A causal language model. Subclasses set ``lm_head`` and give `last_norm`."""

    span = CAUSAL
    lm_head: Head

    @abstractmethod
    def last_norm(self, x: Tensor) -> Tensor:
        """The norm between the last block and the head: [T, hidden] -> [T, hidden]."""

    def outputs(self, batch: Batch) -> tuple[Tensor, None]:
        return self.lm_head(batch.at_targets(self.last_norm(self.encode(batch)))), None

    def predict(self, x: Tensor, batch: Batch, return_logits: bool) -> Output:
        x = self.last_norm(x)
        if batch.targets is not None:
            x = x.index_select(0, batch.targets)
        loss, correct, predicted = self.lm_head(x, batch.labels)
        return Output(loss, correct, predicted, self.lm_head(x) if return_logits else None)
