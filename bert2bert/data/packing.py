"""Packing: documents into rows of exactly `seq_len` slots with next to no filler.

A document is cut into segments of at most seq_len - 2 tokens; with [CLS] and [SEP] a segment takes its length + 2
slots. Rows are composed from the histogram of segment lengths, longest first and each gap filled by the longest
segment that fits (histogram packing; Krell et al. 2021, arXiv:2107.02027), so the work grows with seq_len and not with
the text. Where nothing fits and the gap is wide, one more segment is cut to fill it.

Which lengths lie together is the same in every epoch, therefore so is the number of rows, and any row of any epoch is
found without computing the epochs before. What changes by (seed, epoch): which documents of equal length fill a place,
the order of the rows, and where a long document has its short segment (so its cuts move). In an epoch every token of
the split appears exactly once.

Memory per process: about 40 bytes per document and 8 per row. Refuses sequences shorter than 8 or longer than 65,535.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass

import numpy as np

from bert2bert.errors import InvalidConfig

SPECIALS = 2  # [CLS] and [SEP]


@dataclass(frozen=True)
class Segments:
    """The segments of some rows, row after row; together they fill every slot.

    row: int64 [n], index into the rows asked for. start: int64 [n], the first token in the split, -1 for filler.
    slots: int64 [n], slots taken ([CLS] and [SEP] included).
    """

    row: np.ndarray
    start: np.ndarray
    slots: np.ndarray


class Packer:
    """The endless sequence of packed rows of one split: epoch 0, epoch 1, …

    offsets: int64 [documents + 1] from `TokenBins.split`.
    """

    def __init__(self, offsets: np.ndarray, seq_len: int, seed: int) -> None:
        if not 8 <= seq_len <= 65535:
            raise InvalidConfig(f"seq_len is {seq_len}, expected 8 to 65535.")
        self.seq_len, self.seed = seq_len, seed
        self.content = seq_len - SPECIALS
        self._begin = np.asarray(offsets[:-1], dtype=np.int64)
        lengths = np.diff(offsets)
        whole, rest = np.divmod(lengths, self.content)
        self._whole_until = np.cumsum(whole)  # rows that are one full segment come first
        self._rest = rest.astype(np.uint16)
        self.whole_rows = int(self._whole_until[-1]) if len(lengths) else 0
        self._short = np.flatnonzero(rest).astype(np.uint32 if len(lengths) < 1 << 32 else np.int64)
        self._rows = _compose(np.sort(self._rest[self._short], kind="stable").astype(np.int64) + SPECIALS, seq_len)
        self.rows = self.whole_rows + len(self._rows.until) - 1
        self.fill = float(lengths.sum() + SPECIALS * self._count_segments()) / (self.rows * seq_len)
        self._epochs: dict[int, _Epoch] = {}

    def _count_segments(self) -> int:
        return self.whole_rows + int((self._rows.piece >= 0).sum())

    def max_segments(self, rows: int) -> int:
        """No `rows` consecutive rows hold more segments, filler included: the static length of cu_seqlens less one."""
        counts = np.sort(np.diff(self._rows.until))[::-1][:rows]
        epochs = 1 + -(-(rows - 1) // self.rows)  # that the rows may touch, each with the widest rows in it
        counts = np.repeat(counts, epochs)[:rows]
        return int(counts.sum()) + rows - len(counts)

    def segments(self, rows: np.ndarray) -> Segments:
        """The segments of rows (int64 [n]) of the endless sequence."""
        epochs, local = np.divmod(rows, self.rows)
        if len(rows) and epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
            return self._segments(self._epoch(int(epochs[0])), local)
        parts: list[Segments] = []
        for epoch in np.unique(epochs):
            at = np.flatnonzero(epochs == epoch)
            part = self._segments(self._epoch(int(epoch)), local[at])
            parts.append(Segments(at[part.row], part.start, part.slots))
        if not parts:
            empty = np.zeros(0, dtype=np.int64)
            return Segments(empty, empty, empty)
        row = np.concatenate([part.row for part in parts])
        order = np.argsort(row, kind="stable")
        start = np.concatenate([part.start for part in parts])
        return Segments(row[order], start[order], np.concatenate([part.slots for part in parts])[order])

    def _segments(self, epoch: _Epoch, local: np.ndarray) -> Segments:
        row = epoch.order[local].astype(np.int64)
        packed = row - self.whole_rows
        full = packed < 0
        until = self._rows.until
        at = np.where(full, 0, packed)
        first = until[at]
        count = np.where(full, 1, until[at + ~full] - first)
        ends = np.cumsum(count)
        total = int(ends[-1])
        of = np.repeat(np.arange(len(local)), count)
        place = np.arange(total) + np.repeat(first - (ends - count), count)
        # A row of one full segment has no entry in the table: read any, then overwrite.
        lone = full[of]
        place[lone] = 0
        piece = self._rows.piece[place].astype(np.int64) if len(self._rows.piece) else np.zeros(total, dtype=np.int64)
        slots = self._rows.slots[place].astype(np.int64) if len(self._rows.slots) else np.zeros(total, dtype=np.int64)
        start = np.full(total, -1, dtype=np.int64)
        if not full.all():
            held = np.flatnonzero(~lone & (piece >= 0))
            document = epoch.ranked[piece[held]]
            inside = epoch.short_at[document].astype(np.int64) * self.content + self._rows.skip[place[held]]
            start[held] = self._begin[document] + inside
        if full.any():
            row = row[full]
            document = np.searchsorted(self._whole_until, row, side="right")
            before = row - np.where(document > 0, self._whole_until[document - 1], 0)
            past = np.where(before >= epoch.short_at[document], self._rest[document], 0)
            start[lone] = self._begin[document] + before * self.content + past
            slots[lone] = self.seq_len
        return Segments(of, start, slots)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch may straddle two epochs
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self.seed % (1 << 64), epoch])
        whole = np.diff(self._whole_until, prepend=0)
        short_at = rng.integers(0, whole, endpoint=True, dtype=np.int64).astype(
            np.uint32 if len(whole) == 0 or whole.max() < 1 << 32 else np.int64
        )
        shuffled = rng.permutation(self._short)
        ranked = shuffled[np.argsort(self._rest[shuffled], kind="stable")]
        order = rng.permutation(np.arange(self.rows, dtype=np.uint32 if self.rows < 1 << 32 else np.int64))
        return _Epoch(order, ranked, short_at)


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # [rows] row of the table at each place of the epoch
    ranked: np.ndarray  # [short segments] documents in order of their short segment's length
    short_at: np.ndarray  # [documents] full segments before the document's short one


@dataclass(frozen=True)
class _Rows:
    """Rows of short segments: entries until[i] … until[i + 1] are row i's.

    piece: rank of the segment among all, by length; -1 for filler. skip: tokens of it that other rows hold.
    """

    until: np.ndarray
    piece: np.ndarray
    skip: np.ndarray
    slots: np.ndarray


class _Pool:
    """Segments not yet placed, by slots; ids are ranks."""

    def __init__(self, slots: np.ndarray) -> None:
        sizes, first, counts = np.unique(slots, return_index=True, return_counts=True)
        self.sizes = [int(size) for size in sizes]
        self.count = {int(size): int(n) for size, n in zip(sizes, counts, strict=True)}
        self._stock: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {
            int(size): [(np.arange(a, a + n, dtype=np.int64), np.zeros(n, dtype=np.int32))]
            for size, a, n in zip(sizes, first, counts, strict=True)
        }

    def take(self, size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        ids, skips = [], []
        self.count[size] -= n
        stock = self._stock[size]
        while n:
            rank, skip = stock.pop()
            if len(rank) > n:
                stock.append((rank[n:], skip[n:]))
            ids.append(rank[:n])
            skips.append(skip[:n])
            n -= len(ids[-1])
        if not self.count[size]:
            del self.count[size], self._stock[size]
            self.sizes.remove(size)
        return np.concatenate(ids), np.concatenate(skips)

    def put(self, size: int, ids: np.ndarray, skips: np.ndarray) -> None:
        if size not in self.count:
            insort(self.sizes, size)
            self.count[size], self._stock[size] = 0, []
        self.count[size] += len(ids)
        self._stock[size].append((ids, skips))


def _compose(slots: np.ndarray, seq_len: int) -> _Rows:
    """Compose rows from segments that take `slots` (ascending, each less than seq_len)."""
    pool = _Pool(slots)
    narrow = max(8, seq_len // 64)  # a gap below this stays filler
    counts, pieces, skips, sizes = [], [], [], []
    while pool.sizes:
        gap, chosen, at = seq_len, [], len(pool.sizes)
        while (at := bisect_right(pool.sizes, gap, hi=at) - 1) >= 0:
            size = pool.sizes[at]
            times = min(gap // size, pool.count[size])
            chosen.append((size, times))
            gap -= size * times
        used = dict(chosen)
        cut = 0
        if gap >= narrow:
            left = [size for size in reversed(pool.sizes) if pool.count[size] > used.get(size, 0)]
            cut = left[0] if left else 0
        if cut:
            used[cut] = used.get(cut, 0) + 1
        rows = min(pool.count[size] // times for size, times in used.items())
        columns = []
        for size, times in chosen:
            rank, skip = pool.take(size, rows * times)
            columns.append((rank.reshape(rows, times), skip.reshape(rows, times), size))
        if cut:
            rank, skip = pool.take(cut, rows)
            columns.append((rank.reshape(rows, 1), skip.reshape(rows, 1), gap))
            pool.put(cut - gap + SPECIALS, rank, skip + (gap - SPECIALS))
        elif gap:
            nothing = np.full((rows, 1), -1, dtype=np.int64)
            columns.append((nothing, np.zeros((rows, 1), dtype=np.int32), gap))
        width = sum(rank.shape[1] for rank, _, _ in columns)
        counts.append(np.full(rows, width, dtype=np.int64))
        pieces.append(np.concatenate([rank for rank, _, _ in columns], axis=1).ravel())
        skips.append(np.concatenate([skip for _, skip, _ in columns], axis=1).ravel())
        row = np.concatenate([np.full(rank.shape[1], size, dtype=np.uint16) for rank, _, size in columns])
        sizes.append(np.tile(row, rows))
    until = np.zeros(sum(len(c) for c in counts) + 1, dtype=np.int64)
    if counts:
        np.cumsum(np.concatenate(counts), out=until[1:])
    return _Rows(
        until,
        np.concatenate([np.zeros(0, np.int64), *pieces]),
        np.concatenate([np.zeros(0, np.int32), *skips]),
        np.concatenate([np.zeros(0, np.uint16), *sizes]),
    )
