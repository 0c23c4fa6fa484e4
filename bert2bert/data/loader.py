"""Micro-batches of packed, masked rows for one rank.

The data are one endless sequence of rows (`packing.py`), masked by row number (`masking.py`). With R rows a micro-batch
and W ranks, micro-batch k of the job is rows [k R W, (k + 1) R W), rank r takes the r-th R of them; so the same rows
make the same step at any world size, and the position is one number: rows consumed by all ranks.

Shapes are static: T = R * seq_len tokens, cu_seqlens of a fixed length, a fixed number of masked positions. The filler
at a row's end is a segment of its own, so it attends only itself; its length is left out of `lengths`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.masking import Masker
from bert2bert.data.packing import Packer
from bert2bert.errors import InvalidConfig, InvalidData
from bert2bert.model.batch import Batch

_BLOCK = 1 << 15  # tokens assembled at once: small micro-batches share the cost of a call, arrays stay in the cache


class _Assembler:
    """Rows by number → Batches."""

    def __init__(self, bins: TokenBins, split: str, seq_len: int, rows: int, seed: int, mlm_probability: float) -> None:
        self.bins, self.split_name, self.seq_len, self.rows = bins, split, seq_len, rows
        tokens, offsets = bins.split(split)
        self.tokens = np.asarray(tokens)  # a plain view of the map: np.memmap is slow to index
        self.packer = Packer(offsets, seq_len, seed)
        self.masker = Masker(bins.vocab_size, bins.special, seq_len, mlm_probability, seed)
        self.capacity = self.packer.max_segments(rows)
        self.block = max(1, _BLOCK // (rows * seq_len))

    def batches(self, numbers: np.ndarray) -> list[Batch]:
        """The micro-batches of the rows `numbers`, int64 [micro-batches, rows]; below 0: a row of filler."""
        count, length, special = len(numbers), self.rows * self.seq_len, self.bins.special
        numbers = numbers.reshape(-1)
        start, slots = self._segments(numbers)
        ends = np.cumsum(slots)
        begins = ends - slots
        filler = start < 0
        at = np.arange(count * length)
        ids = np.take(self.tokens, at + np.repeat(start - 1 - begins, slots), mode="clip").astype(np.int64)
        ids[begins] = special["cls"]
        ids[ends - 1] = special["sep"]
        for i in np.flatnonzero(filler):
            ids[begins[i] : ends[i]] = special["pad"]
        positions = at - np.repeat(begins, slots)
        real = np.full(len(numbers), self.seq_len, dtype=np.int64)
        real[begins[filler] // self.seq_len] -= slots[filler]
        try:
            masked, labels = self.masker(ids.reshape(-1, self.seq_len), numbers, real)
        except IndexError:
            raise InvalidData(
                f"token bins {self.bins.folder}: split '{self.split_name}' holds token id {int(ids.max())}, expected"
                f" less than {self.bins.vocab_size}.\n  The file is damaged; make it again with bert2bert prepare."
            ) from None
        base = np.arange(0, count * length, length)
        edges = np.append(np.searchsorted(begins, base), len(begins))
        cu_seqlens = np.full((count, self.capacity + 1), length, dtype=np.int32)
        for k, (first, stop) in enumerate(pairwise(edges)):
            cu_seqlens[k, : stop - first] = begins[first:stop] - base[k]
        kept, until = slots[~filler], np.append(0, np.cumsum(~filler))[edges].tolist()
        columns = (
            torch.from_numpy(ids).view(count, -1).unbind(),
            torch.from_numpy(positions).view(count, -1).unbind(),
            torch.from_numpy(cu_seqlens).unbind(),
            torch.from_numpy(masked.reshape(count, -1) - base[:, None]).unbind(),
            torch.from_numpy(labels).view(count, -1).unbind(),
        )
        types = torch.zeros(length, dtype=torch.int64)
        return [
            Batch(
                tokens=tokens,
                positions=places,
                types=types,
                cu_seqlens=offsets,
                max_seqlen=self.seq_len,
                targets=chosen,
                labels=answers,
                lengths=kept[until[k] : until[k + 1]],
            )
            for k, (tokens, places, offsets, chosen, answers) in enumerate(zip(*columns, strict=True))
        ]

    def _segments(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first token or -1, slots) of the segments that fill the rows, in order."""
        present = numbers >= 0
        if present.all():
            found = self.packer.segments(numbers)
            return found.start, found.slots
        found = self.packer.segments(numbers[present])
        absent = np.flatnonzero(~present)
        order = np.argsort(np.concatenate([np.flatnonzero(present)[found.row], absent]), kind="stable")
        start = np.concatenate([found.start, np.full(len(absent), -1)])
        slots = np.concatenate([found.slots, np.full(len(absent), self.seq_len)])
        return start[order], slots[order]


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
        mlm_probability: float = 0.15,
    ) -> None:
        _check_ranks(rows_per_batch, rank, world)
        self._assembler = _Assembler(bins, split, seq_len, rows_per_batch, seed, mlm_probability)
        self._rows, self._rank, self._world = rows_per_batch, rank, world
        self._next = 0
        self._ready: deque[Batch] = deque()

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
    seq_len: int,
    rows: int,
    max_rows: int | None,
    rank: int,
    world: int,
    seed: int,
    mlm_probability: float = 0.15,
) -> list[Batch]:
    """This rank's share of the split's first `max_rows` packed rows (None: all), with masks that never change.

    rows: rows of a micro-batch. Every rank gets equally many batches of the same shapes. The real rows are spread
    evenly; a batch may hold none (no label but -100) only if there are fewer rows than batches of all ranks. Together
    the ranks hold the same rows and masks at any world size.
    """
    _check_ranks(rows, rank, world)
    if max_rows is not None and max_rows < 1:
        raise InvalidConfig(f"the number of evaluation rows is {max_rows}, expected at least 1.")
    assembler = _Assembler(bins, split, seq_len, rows, seed, mlm_probability)
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
