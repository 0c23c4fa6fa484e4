"""Packing: nothing lost, nothing twice, next to no filler, and any epoch found without the ones before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bert2bert.data.packing import Frame, Packer
from bert2bert.errors import InvalidConfig

RNG = np.random.default_rng(0)
MIXES: dict[str, tuple[Sequence[int], int]] = {
    "articles 128": (np.maximum(1, RNG.lognormal(5.6, 1.2, 4000)).astype(int), 128),
    "articles 512": (np.maximum(1, RNG.lognormal(5.6, 1.2, 8000)).astype(int), 512),
    "articles 2048": (np.maximum(1, RNG.lognormal(5.6, 1.2, 20000)).astype(int), 2048),
    "books 512": (RNG.integers(100_000, 300_000, 7), 512),
    "books 32": (RNG.integers(10_000, 30_000, 7), 32),
    "sentences 512": (RNG.poisson(20, 20_000) + 1, 512),
    "all alike 512": (np.full(3000, 300), 512),
    "just too long": (np.full(3000, 600), 512),
    "exact rows": (np.full(50, 126), 128),
}


SEGMENT = Frame(2, 3, each_segment=True)


FRAMES = {
    "each segment": SEGMENT,
    "document's end": Frame(None, 3, each_segment=False),
    "document's beginning and end": Frame(2, 3, each_segment=False),
    "nothing": Frame(None, None, each_segment=True),
}


def packer(lengths: Sequence[int], seq_len: int, seed: int = 0, frame: Frame = SEGMENT) -> Packer:
    return Packer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), seq_len, seed, frame)


def epoch(packed: Packer, number: int) -> np.ndarray:
    """[segments, 3]: row in the epoch, first token or -1, slots."""
    found = packed.segments(np.arange(number * packed.rows, (number + 1) * packed.rows))
    return np.stack([found.row, found.start, found.slots], axis=1)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("mix", list(MIXES))
def test_every_token_exactly_once_in_full_rows(mix: str, frame: str) -> None:
    lengths, seq_len = MIXES[mix]
    packed = packer(lengths, seq_len, frame=FRAMES[frame])
    ends = np.cumsum(lengths)
    for number in (0, 1, 5):
        found = packed.segments(np.arange(number * packed.rows, (number + 1) * packed.rows))
        real = found.start >= 0
        before = found.opens & (packed.frame.before is not None)
        after = found.closes & (packed.frame.after is not None)
        start, stop = found.start[real], (found.start + found.slots - before - after)[real]
        # No segment crosses a document's end; the segments tile the split without gap or overlap.
        some = stop > start
        last = np.searchsorted(ends, stop[some] - 1, side="right")
        assert (np.searchsorted(ends, start[some], side="right") == last).all()
        order = np.lexsort((stop, start))
        assert start[order][0] == 0 and stop[order][-1] == ends[-1]
        assert (start[order][1:] == stop[order][:-1]).all()
        if packed.frame.each_segment:
            assert some.all() and found.opens[real].all() and found.closes[real].all()
        else:
            assert found.opens.sum() == found.closes.sum() == len(lengths)
            assert np.isin(start[found.opens[real]], ends - lengths).all()
            assert np.isin(stop[found.closes[real]], ends).all()
        assert (np.bincount(found.row, weights=found.slots, minlength=packed.rows) == seq_len).all()
        assert found.slots[real].sum() / (packed.rows * seq_len) == pytest.approx(packed.fill, rel=1e-12)
        documents = np.searchsorted(ends, start[some], side="right")
        alone = packed.pieces(number) - np.bincount(documents, minlength=len(lengths))
        assert alone.sum() == (~some).sum() and set(alone) <= {0, 1}
    assert packed.fill >= (0.98 if mix == "exact rows" else 0.99)


def test_tiny_splits() -> None:
    for lengths in ([1], [30], [31], [1, 1], [62], [63, 1]):
        packed = packer(lengths, 32)
        rows = epoch(packed, 3)
        assert (rows[rows[:, 1] >= 0][:, 2] - 2).sum() == sum(lengths)


def test_epochs_differ_and_repeat() -> None:
    lengths = MIXES["articles 128"][0]
    packed = packer(lengths, 128)
    first, second = epoch(packed, 0), epoch(packed, 1)
    assert not np.array_equal(first, second)
    # A long document's cuts move too: not only the order of the same segments.
    assert set(map(tuple, first[:, 1:])) != set(map(tuple, second[:, 1:]))
    for number in range(2, 6):
        epoch(packed, number)
    assert np.array_equal(first, epoch(packed, 0))
    fresh = packer(lengths, 128)
    assert np.array_equal(second, epoch(fresh, 1))
    assert not np.array_equal(first, epoch(packer(lengths, 128, seed=1), 0))


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    packed = packer(MIXES["articles 128"][0][:300], 128)
    numbers = np.arange(packed.rows - 20, packed.rows + 20)  # straddles two epochs
    together = packed.segments(numbers)
    for i, number in enumerate(numbers):
        alone = packed.segments(np.array([number]))
        mine = together.row == i
        assert np.array_equal(alone.start, together.start[mine])
        assert np.array_equal(alone.slots, together.slots[mine])


def test_max_segments_is_a_bound_that_is_reached() -> None:
    for lengths, seq_len in ([[3] * 10 + [28] * 3, 32], [[400], 32], [MIXES["sentences 512"][0][:500], 512]):
        packed = packer(lengths, seq_len)
        for rows in (1, 2, 3, 40):
            most = 0
            for first in range(6 * packed.rows):
                most = max(most, len(packed.segments(np.arange(first, first + rows)).row))
            assert most <= packed.max_segments(rows)
            if rows == 1:
                assert most == packed.max_segments(1)


@pytest.mark.parametrize("seq_len", [0, 7, 65536])
def test_row_lengths_out_of_range(seq_len: int) -> None:
    with pytest.raises(InvalidConfig, match=f"seq_len is {seq_len}, expected 8 to 65535"):
        packer([10], seq_len)
