"""Packed rows before and after an objective has chosen what is predicted. NumPy only.

`Rows` is what the loader lays out; `Predicted` is what an objective makes of it, micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bert2bert.data.masking import IGNORE


@dataclass(frozen=True)
class Rows:
    """The packed rows of n micro-batches of T tokens each, special tokens and filler in place.

    tokens: int64 [n, T]; an objective may write to it. begins, slots: int64 [s], where each segment lies in the
    flattened tokens. real: bool [s], False for filler. edges: int64 [n + 1], each micro-batch's first segment.
    numbers: int64 [rows], of every row, below 0 for a row of filler. seq_len: slots of a row. capacity: no micro-batch
    has more segments.
    """

    tokens: np.ndarray
    begins: np.ndarray
    slots: np.ndarray
    real: np.ndarray
    edges: np.ndarray
    numbers: np.ndarray
    seq_len: int
    capacity: int

    @classmethod
    def whole(cls, tokens: np.ndarray, first: int) -> Rows:
        """One micro-batch of rows [rows, length] that are one segment each, numbered from `first`."""
        rows, length = tokens.shape
        every = np.ones(rows, dtype=bool)
        begins, slots = np.arange(0, rows * length, length), np.full(rows, length)
        numbers = np.arange(first, first + rows)
        return cls(tokens.reshape(1, -1), begins, slots, every, np.array([0, rows]), numbers, length, rows)

    def positions(self) -> np.ndarray:
        """int64 [n, T], from 0 in each segment."""
        return (np.arange(self.tokens.size) - np.repeat(self.begins, self.slots)).reshape(self.tokens.shape)

    def cu_seqlens(self) -> np.ndarray:
        """int32 [n, capacity + 1]: offsets of the segments, filler included; the tail repeats T."""
        count, length = self.tokens.shape
        found = np.full((count, self.capacity + 1), length, dtype=np.int32)
        for k, (first, stop) in enumerate(pairwise(self.edges)):
            found[k, : stop - first] = self.begins[first:stop] - k * length
        return found

    def lengths(self) -> list[np.ndarray]:
        """Lengths of the real segments of each micro-batch, int64."""
        return [self.slots[a:b][self.real[a:b]] for a, b in pairwise(self.edges)]

    def real_slots(self) -> np.ndarray:
        """Slots of each row that are not filler: int64 [rows]."""
        found = np.full(len(self.numbers), self.seq_len, dtype=np.int64)
        found[self.begins[~self.real] // self.seq_len] -= self.slots[~self.real]
        return found


Arrays = Sequence[np.ndarray] | np.ndarray
"""One array for each micro-batch: a list, or the rows of a larger one."""


@dataclass(frozen=True)
class Sequences:
    """Flat tokens of n micro-batches: the k-th entries are `Batch`'s or `Decoder`'s, as arrays."""

    tokens: Arrays
    cu_seqlens: Arrays
    max_seqlen: int
    lengths: Arrays


@dataclass(frozen=True)
class Predicted:
    """What the model reads and what it is to predict, for n micro-batches; fields as `Batch` names them."""

    read: Sequences
    positions: Arrays
    targets: Arrays | None
    labels: Arrays
    decoder: Sequences | None = None


def laid_out(rows: Rows, targets: np.ndarray | None, labels: np.ndarray) -> Predicted:
    """The rows as they are, shapes static. targets, labels: int64 [n, M]."""
    read = Sequences(rows.tokens, rows.cu_seqlens(), rows.seq_len, rows.lengths())
    return Predicted(read, rows.positions(), targets, labels)


def next_tokens(rows: Rows) -> np.ndarray:
    """The token behind each in its own segment, -100 at a segment's end and in filler: int64 [n, T]."""
    flat = rows.tokens.reshape(-1)
    labels = np.empty_like(flat)
    labels[:-1] = flat[1:]
    ends = rows.begins + rows.slots
    labels[ends - 1] = IGNORE
    for i in np.flatnonzero(~rows.real):
        labels[rows.begins[i] : ends[i]] = IGNORE
    return labels.reshape(rows.tokens.shape)
