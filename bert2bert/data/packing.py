"""Packing: documents into rows of exactly `seq_len` slots with next to no filler.

A document is cut into segments that fit a row. Special tokens are put around every segment ([CLS] and [SEP]: a segment
of n tokens takes n + 2 slots) or around every document, whose cuts then have none (`Frame`). Rows are composed from the
histogram of segment lengths, longest first and each gap filled by the longest segment that fits (histogram packing;
Krell et al. 2021, arXiv:2107.02027), so the work grows with seq_len and not with the text. Where nothing fits and the
gap is wide, one more segment is cut to fill it.

Which lengths lie together is the same in every epoch, therefore so is the number of rows, and any row of any epoch is
found without computing the epochs before. What changes by (seed, epoch): which documents of equal length fill a place,
the order of the rows, and where a long document has its short segment (so its cuts move). In an epoch every token of
the split appears exactly once. `Packer.pieces` says which documents are cut, and how often.

Memory per process: about 40 bytes per document and 8 per row. Refuses sequences shorter than 8 or longer than 65,535.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bert2bert.errors import InvalidConfig


@dataclass(frozen=True)
class Frame:
    """Special tokens around text: ids, None where there is none, around each segment or each document."""

    before: int | None
    after: int | None
    each_segment: bool

    @property
    def count(self) -> int:
        """Slots that they take."""
        return (self.before is not None) + (self.after is not None)


@dataclass(frozen=True)
class Segments:
    """The segments of some rows, row after row; together they fill every slot.

    row: int64 [n], index into the rows asked for. start: int64 [n], the first token in the split, -1 for filler.
    slots: int64 [n], slots taken, special tokens included. opens, closes: bool [n], whether the frame's token stands
    before and behind it.
    """

    row: np.ndarray
    start: np.ndarray
    slots: np.ndarray
    opens: np.ndarray
    closes: np.ndarray

    @classmethod
    def merged(cls, parts: Sequence[tuple[np.ndarray, Segments]]) -> Segments:
        """Of several sets of rows, which are renumbered: (new numbers of the rows, their segments)."""
        row = np.concatenate([numbers[part.row] for numbers, part in parts])
        order = np.argsort(row, kind="stable")
        columns = zip(*(part._columns()[1:] for _, part in parts), strict=True)
        return cls(row[order], *(np.concatenate(column)[order] for column in columns))

    @classmethod
    def filler(cls, rows: int, seq_len: int) -> Segments:
        """Rows of filler, each in one piece."""
        none = np.zeros(rows, dtype=bool)
        return cls(np.arange(rows), np.full(rows, -1), np.full(rows, seq_len), none, none)

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.row, self.start, self.slots, self.opens, self.closes


class Packer:
    """The endless sequence of packed rows of one split: epoch 0, epoch 1, …

    offsets: int64 [documents + 1] from `TokenBins.split`. frame: the special tokens, for which slots are left free.
    """

    def __init__(self, offsets: np.ndarray, seq_len: int, seed: int, frame: Frame) -> None:
        if not 8 <= seq_len <= 65535:
            raise InvalidConfig(f"seq_len is {seq_len}, expected 8 to 65535.")
        self.seq_len, self.seed, self.frame = seq_len, seed, frame
        specials, more = (frame.count, 0) if frame.each_segment else (0, frame.count)
        self.content = seq_len - specials
        self._offsets = np.asarray(offsets, dtype=np.int64)
        lengths = np.diff(offsets) + more
        whole, rest = np.divmod(lengths, self.content)
        self._whole_until = np.cumsum(whole)  # rows that are one full segment come first
        self._rest = rest.astype(np.uint16)
        self.whole_rows = int(self._whole_until[-1]) if len(lengths) else 0
        self._short = np.flatnonzero(rest).astype(np.uint32 if len(lengths) < 1 << 32 else np.int64)
        self._rows = _compose(
            np.sort(self._rest[self._short], kind="stable").astype(np.int64) + specials, seq_len, specials
        )
        self.rows = self.whole_rows + len(self._rows.until) - 1
        segments = self.whole_rows + int((self._rows.piece >= 0).sum())
        self.fill = float(lengths.sum() + specials * segments) / (self.rows * seq_len)
        self._epochs: dict[int, _Epoch] = {}

    def pieces(self, epoch: int = 0) -> np.ndarray:
        """Into how many segments each document is cut in an epoch: int64 [documents]."""
        short = self._epoch(epoch).ranked[self._rows.piece[self._rows.piece >= 0]]
        count = np.bincount(short, minlength=len(self._whole_until))
        return count + np.diff(self._whole_until, prepend=0)

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
        parts = []
        for epoch in np.unique(epochs):
            at = np.flatnonzero(epochs == epoch)
            parts.append((at, self._segments(self._epoch(int(epoch)), local[at])))
        return Segments.merged(parts) if parts else Segments.filler(0, self.seq_len)

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
        document = np.full(total, -1, dtype=np.int64)
        inside = np.zeros(total, dtype=np.int64)  # slots of the document that other segments hold
        if not full.all():
            held = np.flatnonzero(~lone & (piece >= 0))
            document[held] = found = epoch.ranked[piece[held]]
            inside[held] = epoch.short_at[found].astype(np.int64) * self.content + self._rows.skip[place[held]]
        if full.any():
            row = row[full]
            document[lone] = found = np.searchsorted(self._whole_until, row, side="right")
            before = row - np.where(found > 0, self._whole_until[found - 1], 0)
            past = np.where(before >= epoch.short_at[found], self._rest[found], 0)
            inside[lone] = before * self.content + past
            slots[lone] = self.seq_len
        return self._framed(of, document, inside, slots)

    def _framed(self, of: np.ndarray, document: np.ndarray, inside: np.ndarray, slots: np.ndarray) -> Segments:
        real = document >= 0
        begin, frame = self._offsets[document], self.frame
        if frame.each_segment:
            return Segments(of, np.where(real, begin + inside, -1), slots, real, real)
        opens = real & (inside == 0)
        closes = real & (inside + slots == self._offsets[document + 1] - begin + frame.count)
        past = np.where(opens, 0, inside - (frame.before is not None))
        return Segments(of, np.where(real, begin + past, -1), slots, opens, closes)

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


def _compose(slots: np.ndarray, seq_len: int, specials: int) -> _Rows:
    """Compose rows from segments that take `slots` (ascending, each less than seq_len), `specials` of them each."""
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
            pool.put(cut - gap + specials, rank, skip + (gap - specials))
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
