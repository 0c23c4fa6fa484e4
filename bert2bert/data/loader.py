"""Micro-batches of packed, masked rows for one rank.

The data are one endless sequence of rows (`packing.py`), masked by row number (`masking.py`). With R rows a micro-batch and
W ranks, micro-batch k of the job is rows [k R W, (k + 1) R W), rank r takes the r-th R of them; so the same rows make the
same step at any world size, and the position is one number: rows consumed by all ranks.

Shapes are static: T = R * seq_len tokens, cu_seqlens of a fixed length, a fixed number of masked positions. The filler at
a row's end is a segment of its own, so it attends only itself; it is not counted in real_tokens or attended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.masking import Masker
from bert2bert.data.packing import Packer
from bert2bert.errors import InvalidConfig, InvalidData
from bert2bert.model.batch import Batch


class _Assembler:
    """Rows by number → Batch."""

    def __init__(self, bins: TokenBins, split: str, seq_len: int, seed: int, mask_share: float) -> None:
        self.bins, self.split_name, self.seq_len = bins, split, seq_len
        self.tokens, offsets = bins.split(split)
        self.packer = Packer(offsets, seq_len, seed)
        self.masker = Masker(bins.vocab_size, bins.special, seq_len, mask_share, seed)

    def batch(self, numbers: np.ndarray, rows: int, capacity: int) -> Batch:
        """The rows `numbers` (at most `rows`, the missing ones are all filler) with at most `capacity` segments."""
        seq_len, special = self.seq_len, self.bins.special
        length = rows * seq_len
        found = self.packer.segments(numbers)
        start, slots = found.start, found.slots
        if missing := rows - len(numbers):
            start = np.concatenate([start, np.full(missing, -1, dtype=np.int64)])
            slots = np.concatenate([slots, np.full(missing, seq_len, dtype=np.int64)])
        ends = np.cumsum(slots)
        begins = ends - slots
        filler = start < 0
        at = np.arange(length)
        ids = np.take(self.tokens, at + np.repeat(start - 1 - begins, slots), mode="clip").astype(np.int64)
        ids[begins] = special["cls"]
        ids[ends - 1] = special["sep"]
        for i in np.flatnonzero(filler):
            ids[begins[i] : ends[i]] = special["pad"]
        positions = at - np.repeat(begins, slots)
        real = np.full(rows, seq_len, dtype=np.int64)
        real[begins[filler] // seq_len] -= slots[filler]
        keys = np.zeros(rows, dtype=np.int64)  # rows that are all filler: any number
        keys[: len(numbers)] = numbers
        try:
            masked, labels = self.masker(ids.reshape(rows, seq_len), keys, real)
        except IndexError:
            raise InvalidData(
                f"token bins {self.bins.folder}: split '{self.split_name}' holds token id {int(ids.max())}, expected"
                f" less than {self.bins.vocab_size}.\n  The file is damaged; make it again with bert2bert prepare."
            ) from None
        cu_seqlens = np.full(capacity + 1, length, dtype=np.int32)
        cu_seqlens[: len(begins)] = begins
        held = slots[~filler]
        return Batch(
            tokens=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            types=torch.zeros(length, dtype=torch.int64),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=seq_len,
            masked=torch.from_numpy(masked),
            labels=torch.from_numpy(labels),
            real_tokens=int(held.sum()),
            attended=int((held * held).sum()),
        )


class MaskedLoader:
    """Endless iterator of this rank's micro-batches.

    rows_per_batch: rows of this rank's micro-batch (R). `rows_per_epoch` and `fill` describe the packing.
    """

    def __init__(
        self,
        bins: TokenBins,
        split: str,
        seq_len: int,
        rows_per_batch: int,
        rank: int,
        world: int,
        seed: int,
        mask_share: float = 0.15,
    ) -> None:
        _check_ranks(rows_per_batch, rank, world)
        self._assembler = _Assembler(bins, split, seq_len, seed, mask_share)
        self._capacity = self._assembler.packer.max_segments(rows_per_batch)
        self._rows, self._rank, self._world = rows_per_batch, rank, world
        self._next = 0

    @property
    def rows_per_epoch(self) -> int:
        """Rows, over all ranks, in which every token of the split appears exactly once."""
        return self._assembler.packer.rows

    @property
    def fill(self) -> float:
        """Share of an epoch's slots that hold real tokens, [CLS] and [SEP] included."""
        return self._assembler.packer.fill

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._next + self._rank * self._rows
        batch = self._assembler.batch(np.arange(first, first + self._rows), self._rows, self._capacity)
        self._next += self._rows * self._world
        return batch

    def state(self) -> dict[str, int]:
        """{"rows": rows consumed by all ranks}, the same on every rank."""
        return {"rows": self._next}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on after `state()`, at any world size and micro-batch."""
        rows = state.get("rows")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise InvalidData(f"loader state has rows = {rows!r}, expected a whole number from 0.")
        self._next = rows


def eval_batches(
    bins: TokenBins,
    split: str,
    seq_len: int,
    rows: int,
    max_rows: int | None,
    rank: int,
    world: int,
    seed: int,
    mask_share: float = 0.15,
) -> list[Batch]:
    """This rank's share of the split's first `max_rows` packed rows (None: all), with masks that never change.

    rows: rows of a micro-batch. Every rank gets equally many batches of the same shapes; the real rows are spread evenly,
    and a batch may hold none (no labels) only if there are fewer rows than batches of all ranks. Together the ranks hold
    the same rows and masks at any world size.
    """
    _check_ranks(rows, rank, world)
    if max_rows is not None and max_rows < 1:
        raise InvalidConfig(f"the number of evaluation rows is {max_rows}, expected at least 1.")
    assembler = _Assembler(bins, split, seq_len, seed, mask_share)
    total = assembler.packer.rows if max_rows is None else min(max_rows, assembler.packer.rows)
    batches = -(-total // (rows * world))
    parts = batches * world
    capacity = assembler.packer.max_segments(rows)
    edges = [i * total // parts for i in range(rank * batches, (rank + 1) * batches + 1)]
    return [assembler.batch(np.arange(a, b), rows, capacity) for a, b in zip(edges, edges[1:], strict=False)]


def _check_ranks(rows: int, rank: int, world: int) -> None:
    if rows < 1:
        raise InvalidConfig(f"rows of a micro-batch: {rows}, expected at least 1.")
    if world < 1 or not 0 <= rank < world:
        raise InvalidConfig(f"rank {rank} of {world}, expected 0 to {world - 1}.")
