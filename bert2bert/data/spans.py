"""Span corruption (Raffel et al. 2020, sections 3.1.4 and 3.3.4): spans of a text are replaced by sentinels, and the
decoder writes the sentinels with what they replaced.

    text      t0 t1 t2 t3 t4 t5 t6 t7 t8        noise: t2 t3, t8
    encoder   t0 t1 <0> t4 t5 t6 t7 <1> eos
    labels    <0> t2 t3 <1> t8 eos              decoder reads: start <0> t2 t3 <1> t8

How many tokens are noise, in how many spans, follows from the segment's length alone, as in T5's
random_spans_noise_mask: so do the lengths of both sequences. Where the spans lie is drawn uniformly, as there; a
segment begins with text and ends with noise. Randomness is a hash of (seed, row number, place of the segment in its
row).

Every segment is corrupted by itself. A micro-batch holds its real segments only, so shapes vary with the packing; one
without any gets one token of padding, of which nothing is predicted.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from bert2bert.data.masking import GOLDEN, IGNORE, mix, mix_int
from bert2bert.data.rows import Predicted, Rows, Sequences


def noise_of(lengths: np.ndarray, density: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """(noise tokens, spans of noise) of texts of `lengths`, int64 of any shape, at least 1: T5's numbers.

    A text of one token is all text: it has no noise, but one sentinel in its labels.
    """
    noise = np.clip(np.rint(lengths * density), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
    noise[lengths == 1] = 0
    count = np.clip(np.rint(noise / mean), 1, np.maximum(np.minimum(noise, lengths - noise), 1)).astype(np.int64)
    return noise, count


def sequence_lengths(lengths: np.ndarray, density: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of what the encoder reads and of the labels, for texts of `lengths`."""
    noise, count = noise_of(lengths, density, mean)
    return lengths - noise + np.minimum(count, noise) + 1, noise + count + 1


class Corrupter:
    """Corrupts the segments of rows.

    sentinels: ids, at least as many as the longest segment has spans. eos ends both sequences; start begins what the
    decoder reads, and is the padding.
    """

    def __init__(
        self, sentinels: tuple[int, ...], eos: int, start: int, density: float, mean: float, seed: int
    ) -> None:
        self.sentinels = np.array(sentinels, dtype=np.int64)
        self.eos, self.start, self.density, self.mean = eos, start, density, mean
        self._base = np.uint64(mix_int(seed ^ 0x7370616E))

    def __call__(self, rows: Rows) -> Predicted:
        begins, lengths = rows.begins[rows.real], rows.slots[rows.real]
        segment = np.repeat(np.arange(len(lengths)), lengths)
        text = rows.tokens.reshape(-1)[np.arange(len(segment)) + (begins - _starts(lengths))[segment]]
        noise, first, number = self._noise(lengths, self._keys(rows, begins))
        sentinel = self.sentinels[number]
        read, read_lengths = self._ended(np.where(noise, sentinel, text), ~noise | first, segment, len(lengths))
        labels, label_lengths = self._ended(np.where(noise, text, sentinel), noise | first, segment, len(lengths))
        written = np.roll(labels, 1)
        written[_starts(label_lengths)] = self.start
        edges = np.append(0, np.cumsum(rows.real))[rows.edges].tolist()
        longest = sequence_lengths(np.array([rows.seq_len]), self.density, self.mean)
        encoder = self._split(read, read_lengths, edges, int(longest[0][0]), self.start)
        return Predicted(
            encoder,
            [np.concatenate([np.arange(n) for n in np.diff(cu)]) for cu in encoder.cu_seqlens],
            None,
            self._split(labels, label_lengths, edges, 0, IGNORE).tokens,
            self._split(written, label_lengths, edges, int(longest[1][0]), self.start),
        )

    def _keys(self, rows: Rows, begins: np.ndarray) -> np.ndarray:
        """A random number of each segment, uint64."""
        row = begins // rows.seq_len
        place = np.arange(len(row)) - np.searchsorted(row, row)
        keys = mix(self._base + rows.numbers[row].astype(np.uint64) * np.uint64(GOLDEN))
        return mix(keys + (place + 1).astype(np.uint64) * np.uint64(GOLDEN))

    def _noise(self, lengths: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every token: whether it is noise, whether it begins a span (of noise or of text), its span's number."""
        noise, count = noise_of(lengths, self.density, self.mean)
        text_spans = _partitions(lengths - noise, count, mix(keys ^ np.uint64(1)))
        noise_spans = _partitions(noise, count, mix(keys ^ np.uint64(2)))
        spans = np.stack([text_spans, noise_spans], axis=1).reshape(-1)
        first = np.zeros(int(lengths.sum()), dtype=bool)
        first[_starts(spans)[spans > 0]] = True
        number = np.arange(len(text_spans)) - np.repeat(_starts(count), count)
        return np.repeat(np.tile([False, True], len(text_spans)), spans), first, np.repeat(np.repeat(number, 2), spans)

    def _ended(
        self, values: np.ndarray, kept: np.ndarray, segment: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The kept values of each segment and an end token behind them, flat, and the lengths of that."""
        segment = segment[kept]
        lengths = np.bincount(segment, minlength=count) + 1
        ended = np.full(len(segment) + count, self.eos)
        ended[np.arange(len(segment)) + segment] = values[kept]
        return ended, lengths

    def _split(self, flat: np.ndarray, lengths: np.ndarray, edges: list[int], longest: int, filler: int) -> Sequences:
        """Flat sequences cut into micro-batches at `edges`, numbers of sequences; where there are none, one filler."""
        offsets = np.append(0, np.cumsum(lengths))
        tokens, cu_seqlens, real = [], [], []
        for a, b in pairwise(edges):
            tokens.append(flat[offsets[a] : offsets[b]] if b > a else np.array([filler]))
            cu_seqlens.append((offsets[a : b + 1] - offsets[a] if b > a else np.arange(2)).astype(np.int32))
            real.append(lengths[a:b])
        return Sequences(tokens, cu_seqlens, longest, real)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where pieces of `lengths` begin, one behind the other."""
    return np.cumsum(lengths) - lengths


def _partitions(items: np.ndarray, parts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Lengths of `parts` non-empty runs that make up each of `items`, drawn uniformly by its key: int64 [sum of parts].

    items, parts: int64 [n]; 0 items in one part give one run of 0.
    """
    gaps = np.maximum(items - 1, 0)
    of = np.repeat(np.arange(len(items), dtype=np.uint64), gaps)
    place = np.arange(len(of)) - np.repeat(_starts(gaps), gaps)
    draws = mix(np.repeat(keys, gaps) + (place + 1).astype(np.uint64) * np.uint64(GOLDEN))
    # The smallest draws of each are its cuts. All are sorted at once, as numbers: 24 bits of which, 24 drawn, 16 where.
    ranked = np.sort(of << np.uint64(40) | (draws >> np.uint64(40)) << np.uint64(16) | place.astype(np.uint64))
    chosen = ranked[place < np.repeat(parts - 1, gaps)]
    cuts = np.sort(chosen >> np.uint64(40) << np.uint64(16) | chosen & np.uint64(0xFFFF)) & np.uint64(0xFFFF)
    ends = np.zeros(int(parts.sum()), dtype=np.int64)
    last = np.zeros(len(ends), dtype=bool)
    last[np.cumsum(parts) - 1] = True
    ends[last] = items
    ends[~last] = cuts.astype(np.int64) + 1
    lengths = np.diff(ends, prepend=0)
    first = _starts(parts)
    lengths[first] = ends[first]
    return lengths
