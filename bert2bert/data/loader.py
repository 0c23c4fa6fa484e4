"""Micro-batches of packed rows for one rank, with what an objective predicts of them.

The data are one endless sequence of rows (`packing.py`); what is predicted of a row depends on its number alone
(`objective.py`). With R rows a micro-batch and W ranks, micro-batch k of the job is rows [k R W, (k + 1) R W), rank r
takes the r-th R of them; so the same rows make the same step at any world size, and the position is one number: rows
consumed by all ranks.

Shapes are static: T = R * seq_len tokens, cu_seqlens of a fixed length, a fixed number of predicted positions (except
for `SpanCorruption`, see `spans.py`). The filler at a row's end is a segment of its own, so it attends only itself; its
length is left out of `lengths`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.objective import Objective
from bert2bert.data.packing import Packer, Segments
from bert2bert.data.rows import Predicted, Rows
from bert2bert.errors import InvalidConfig, InvalidData
from bert2bert.model.batch import Batch, Decoder

_BLOCK = 1 << 15  # tokens assembled at once: small micro-batches share the cost of a call, arrays stay in the cache


class _Assembler:
    """Rows by number → Batches."""

    def __init__(self, bins: TokenBins, split: str, objective: Objective, seq_len: int, rows: int, seed: int) -> None:
        self.bins, self.split_name, self.seq_len, self.rows = bins, split, seq_len, rows
        tokens, offsets = bins.split(split)
        self.tokens = np.asarray(tokens)  # a plain view of the map: np.memmap is slow to index
        self.frame = objective.frame(bins.vocabulary)
        self.packer = Packer(offsets, seq_len, seed, self.frame)
        self.predict = objective.predictor(bins.vocabulary, seq_len, seed)
        self.capacity = self.packer.max_segments(rows)
        self.block = max(1, _BLOCK // (rows * seq_len))

    def batches(self, numbers: np.ndarray) -> list[Batch]:
        """The micro-batches of the rows `numbers`, int64 [micro-batches, rows]; below 0: a row of filler."""
        return _batches(self.predict(self._rows(numbers)))

    def _rows(self, numbers: np.ndarray) -> Rows:
        """The rows with their special tokens and filler in place."""
        count, length, frame = len(numbers), self.rows * self.seq_len, self.frame
        found = self._segments(numbers.reshape(-1))
        ends = np.cumsum(found.slots)
        begins = ends - found.slots
        filler = found.start < 0
        opens = found.opens if frame.before is not None else np.zeros_like(found.opens)
        first = np.repeat(found.start - opens - begins, found.slots)  # of the split, less the slot
        ids = np.take(self.tokens, np.arange(count * length) + first, mode="clip").astype(np.int64)
        if frame.before is not None:
            ids[begins[opens]] = frame.before
        if frame.after is not None:
            ids[ends[found.closes] - 1] = frame.after
        for i in np.flatnonzero(filler):
            ids[begins[i] : ends[i]] = self.bins.vocabulary.filler
        if (most := int(ids.max())) >= self.bins.vocab_size:
            raise InvalidData(
                f"token bins {self.bins.folder}: split '{self.split_name}' holds token id {most}, expected"
                f" less than {self.bins.vocab_size}.\n  The file is damaged; make it again with bert2bert prepare."
            )
        edges = np.append(np.searchsorted(begins, np.arange(0, count * length, length)), len(begins))
        return Rows(
            ids.reshape(count, -1), begins, found.slots, ~filler, edges, numbers.reshape(-1), self.seq_len,
            self.capacity,
        )  # fmt: skip

    def _segments(self, numbers: np.ndarray) -> Segments:
        """The segments that fill the rows, in order."""
        present = numbers >= 0
        if present.all():
            return self.packer.segments(numbers)
        absent = np.flatnonzero(~present)
        return Segments.merged(
            [
                (np.flatnonzero(present), self.packer.segments(numbers[present])),
                (absent, Segments.filler(len(absent), self.seq_len)),
            ]
        )


def _batches(found: Predicted) -> list[Batch]:
    """Arrays → tensors, which share their memory."""
    tensor = torch.from_numpy
    read, decoder, targets = found.read, found.decoder, found.targets
    return [
        Batch(
            tokens=tensor(tokens),
            positions=tensor(found.positions[k]),
            types=torch.zeros(len(tokens), dtype=torch.int64),
            cu_seqlens=tensor(read.cu_seqlens[k]),
            max_seqlen=read.max_seqlen,
            targets=None if targets is None else tensor(targets[k]),
            labels=tensor(found.labels[k]),
            lengths=read.lengths[k],
            decoder=None
            if decoder is None
            else Decoder(
                tensor(decoder.tokens[k]), tensor(decoder.cu_seqlens[k]), decoder.max_seqlen, decoder.lengths[k]
            ),
        )
        for k, tokens in enumerate(read.tokens)
    ]


class Loader:
    """Endless iterator of this rank's micro-batches.

    rows_per_batch: rows of this rank's micro-batch (R). `rows_per_epoch`, `fill` and `cut` describe the packing.
    """

    def __init__(
        self,
        bins: TokenBins,
        split: str,
        objective: Objective,
        seq_len: int,
        rows_per_batch: int,
        rank: int,
        world: int,
        seed: int,
    ) -> None:
        _check_ranks(rows_per_batch, rank, world)
        self._assembler = _Assembler(bins, split, objective, seq_len, rows_per_batch, seed)
        self._rows, self._rank, self._world = rows_per_batch, rank, world
        self._next = 0
        self._ready: deque[Batch] = deque()

    @property
    def rows_per_epoch(self) -> int:
        """Rows, over all ranks, in which every token of the split appears exactly once."""
        return self._assembler.packer.rows

    @property
    def fill(self) -> float:
        """Share of an epoch's slots that hold real tokens, special ones included."""
        return self._assembler.packer.fill

    @property
    def cut(self) -> float:
        """Share of the documents that lie in more than one segment, in the first epoch (`Packer.pieces` says which)."""
        return float((self._assembler.packer.pieces() > 1).mean())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self._rows * self._world
        if not self._ready:
            first = self._next + self._rank * self._rows
            starts = first + step * np.arange(self._assembler.block)
            self._ready.extend(self._assembler.batches(starts[:, None] + np.arange(self._rows)))
        self._next += step
        return self._ready.popleft()

    def state(self) -> dict[str, int]:
        """{"rows": rows consumed by all ranks}, the same on every rank."""
        return {"rows": self._next}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on after `state()`, at any world size and micro-batch."""
        rows = state.get("rows")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise InvalidData(f"loader state has rows = {rows!r}, expected a whole number from 0.")
        self._next = rows
        self._ready.clear()


def eval_batches(
    bins: TokenBins,
    split: str,
    objective: Objective,
    seq_len: int,
    rows: int,
    max_rows: int | None,
    rank: int,
    world: int,
    seed: int,
) -> list[Batch]:
    """This rank's share of the split's first `max_rows` packed rows (None: all), with positions to predict that never
    change.

    rows: rows of a micro-batch. Every rank gets equally many batches of the same shapes. The real rows are spread
    evenly; a batch may hold none (no label but -100) only if there are fewer rows than batches of all ranks. Together
    the ranks hold the same rows and labels at any world size.
    """
    _check_ranks(rows, rank, world)
    if max_rows is not None and max_rows < 1:
        raise InvalidConfig(f"the number of evaluation rows is {max_rows}, expected at least 1.")
    assembler = _Assembler(bins, split, objective, seq_len, rows, seed)
    total = assembler.packer.rows if max_rows is None else min(max_rows, assembler.packer.rows)
    count = -(-total // (rows * world))
    edges = [i * total // (count * world) for i in range(rank * count, (rank + 1) * count + 1)]
    numbers = np.full((count, rows), -1, dtype=np.int64)
    for k, (first, stop) in enumerate(pairwise(edges)):
        numbers[k, : stop - first] = np.arange(first, stop)
    blocks = np.split(numbers, range(assembler.block, count, assembler.block))
    return [batch for block in blocks for batch in assembler.batches(block)]


def _check_ranks(rows: int, rank: int, world: int) -> None:
    if rows < 1:
        raise InvalidConfig(f"rows of a micro-batch: {rows}, expected at least 1.")
    if world < 1 or not 0 <= rank < world:
        raise InvalidConfig(f"rank {rank} of {world}, expected 0 to {world - 1}.")
