"""One micro-batch of flat, packed tokens: the model's only input.

There is no padding and no attention mask: documents lie one behind the other and `cu_seqlens` says where each begins.
Shapes may be kept static by the loader: `cu_seqlens` padded by repeating the last offset (empty sequences),
`max_seqlen` an upper bound, and a fixed count of masked positions whose spare places carry the label -100.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

IGNORE = -100
"""Label of a position that is not predicted (torch's and Hugging Face's convention)."""


@dataclass
class Batch:
    """T tokens of S sequences, M positions for the masked-LM head.

    tokens, positions, types: int64 [T]; positions are ids of the position table (they restart in each sequence).
    cu_seqlens: int32 [S + 1], offsets of the sequences, from 0 to T, not decreasing; the tail may repeat T.
    max_seqlen: no sequence is longer.
    masked, labels: int64 [M], flat indices into [0, T) and the token ids to predict there (-100: not predicted).
    real_tokens: tokens that count (T when nothing is filler); attended: the sum of squared sequence lengths.
    nsp_labels: int64 [S], 0 (is next) or 1 (random) or -100; None: the next-sentence head is left alone.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    masked: torch.Tensor
    labels: torch.Tensor
    real_tokens: int
    attended: int
    nsp_labels: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)
