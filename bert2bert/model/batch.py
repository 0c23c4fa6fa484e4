"""One micro-batch of flat, packed tokens: the model's only input.

There is no padding and no attention mask: documents lie one behind the other and `cu_seqlens` says where each begins.
Shapes may be kept static by the loader: `cu_seqlens` padded by repeating the last offset (empty sequences),
`max_seqlen` an upper bound, and a fixed count of predicted positions whose spare places carry the label -100.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

IGNORE = -100
"""Label of a position that is not predicted (torch's and Hugging Face's convention)."""


_Tensors = TypeVar("_Tensors", bound="_OnDevice")


class _OnDevice:
    """A dataclass of tensors, of others like it, and of plain values."""

    def to(self: _Tensors, device: torch.device | str, non_blocking: bool = False) -> _Tensors:
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), torch.Tensor | _OnDevice)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass
class Decoder(_OnDevice):
    """What the decoder of an encoder-decoder reads: Td tokens of S sequences, the i-th answering the encoder's i-th.

    tokens: int64 [Td], beginning in each sequence with the decoder's start token. cu_seqlens: int32 [S + 1], as the
    encoder's. max_seqlen: no sequence is longer. lengths: int64 [n], of the real sequences.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: np.ndarray


@dataclass
class Batch(_OnDevice):
    """T tokens of S sequences, M positions at which the head predicts.

    tokens, positions, types: int64 [T]; a position is a token's place in its sequence, from 0.
    cu_seqlens: int32 [S + 1], offsets of the sequences, from 0 to T, not decreasing; the tail may repeat T.
    max_seqlen: no sequence is longer.
    targets: int64 [M], flat indices at which the head predicts; None: everywhere, M = T (or the decoder's Td).
    labels: int64 [M], the token ids to predict there (-100: not predicted).
    lengths: int64 [n], lengths of the real sequences, in order; filler is left out.
    nsp_labels: int64 [S], 0 (is next) or 1 (random) or -100; None: the next-sentence head is left alone.
    decoder: what the decoder reads, where there is one; the labels are its.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    targets: torch.Tensor | None
    labels: torch.Tensor
    lengths: np.ndarray
    nsp_labels: torch.Tensor | None = None
    decoder: Decoder | None = None

    @property
    def real_tokens(self) -> int:
        """Tokens of `tokens` that count (T when nothing is filler)."""
        return int(self.lengths.sum())

    @property
    def attended(self) -> int:
        """Pairs of tokens that attend each other without a mask: the sum of squared sequence lengths."""
        return int((self.lengths * self.lengths).sum())

    def at_targets(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [T, ...] at which the head predicts: [M, ...]."""
        return x if self.targets is None else x.index_select(0, self.targets)
