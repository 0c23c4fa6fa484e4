"""The loader: one sequence of rows whatever the ranks, resumed anywhere, masked 80/10/10, static shapes."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bert2bert.data import loader as module
from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader, eval_batches
from bert2bert.data.masking import Masker
from bert2bert.data.objective import Masked
from bert2bert.errors import InvalidConfig, InvalidData
from bert2bert.model.batch import Batch
from tests.data.fixtures import write_bins

SEQ = 32
SHAPES = ("tokens", "positions", "types", "cu_seqlens", "targets", "labels")


@pytest.fixture
def bins(tmp_path: Path) -> TokenBins:
    lengths = np.maximum(1, np.random.default_rng(1).lognormal(3, 1, 150)).astype(int)
    return write_bins(tmp_path / "bins", lengths.tolist(), vocab_size=9000, heldout=[7, 90, 33, 12] * 9, distinct=True)


def loader(bins: TokenBins, rows: int = 4, rank: int = 0, world: int = 1, seed: int = 5) -> Loader:
    return Loader(bins, "train", Masked(), SEQ, rows, rank, world, seed)


def rows_of(batch: Batch) -> list[tuple[bytes, ...]]:
    """A batch row by row: inputs, positions and {place: label}."""
    tokens, positions = batch.tokens.reshape(-1, SEQ), batch.positions.reshape(-1, SEQ)
    labels = torch.full_like(batch.tokens, -100)
    used = batch.labels != -100
    labels[batch.targets[used]] = batch.labels[used]
    return [
        tuple(part.numpy().tobytes() for part in row)
        for row in zip(tokens, positions, labels.reshape(-1, SEQ), strict=True)
    ]


def original(batch: Batch) -> torch.Tensor:
    """The tokens as they were before masking."""
    tokens = batch.tokens.clone()
    used = batch.labels != -100
    tokens[batch.targets[used]] = batch.labels[used]
    return tokens


def test_the_data_do_not_depend_on_the_world_size(bins: TokenBins) -> None:
    alone = [row for batch in islice(loader(bins, rows=12), 4) for row in rows_of(batch)]
    for rows, world in ((4, 3), (6, 2), (3, 4), (1, 12), (2, 1)):
        ranks = [loader(bins, rows=rows, rank=rank, world=world) for rank in range(world)]
        steps = 48 // (rows * world)
        together = [row for _ in range(steps) for rank in ranks for row in rows_of(next(rank))]
        assert together == alone, (rows, world)


def test_resume_is_bit_identical_at_any_world_size(bins: TokenBins) -> None:
    first = loader(bins)
    list(islice(first, 7))
    state = first.state()
    assert state == {"rows": 28}
    expected = list(islice(first, 5))
    again = loader(bins)
    next(again)  # read ahead, then moved
    again.load_state(state)
    for a, b in zip(expected, islice(again, 5), strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in SHAPES)
        assert np.array_equal(a.lengths, b.lengths)
    assert again.state() == first.state() == {"rows": 48}
    ranks = [loader(bins, rows=1, rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state(state)
    assert [row for _ in range(10) for rank in ranks for row in rows_of(next(rank))] == [
        row for batch in expected for row in rows_of(batch)
    ]


@pytest.mark.parametrize("rows", [-1, None, "3", 2.0, True])
def test_a_state_that_is_none(bins: TokenBins, rows: object) -> None:
    with pytest.raises(InvalidData, match="expected a whole number"):
        loader(bins).load_state({"rows": rows})


def test_an_epoch_holds_every_token_once(bins: TokenBins) -> None:
    data = loader(bins, rows=1)
    ids, _ = bins.split("train")
    for _ in range(2):
        batches = list(islice(data, data.rows_per_epoch))
        tokens = torch.cat([original(batch) for batch in batches])
        assert sorted(tokens[tokens > 4].tolist()) == ids.tolist()  # the ids are 5, 6, 7, …
        assert sum(batch.real_tokens for batch in batches) / len(tokens) == pytest.approx(data.fill, rel=1e-12)


def test_layout_of_a_batch(bins: TokenBins) -> None:
    filler = 0
    for batch in islice(loader(bins, rows=3), 60):
        tokens, cu = original(batch), batch.cu_seqlens.tolist()
        assert cu[0] == 0 and cu[-1] == len(tokens) == 3 * SEQ and batch.max_seqlen == SEQ
        lengths = []
        for a, b in pairwise(cu):
            assert 0 <= b - a <= SEQ
            if a == b:
                continue
            assert batch.positions[a:b].tolist() == list(range(b - a))
            assert a // SEQ == (b - 1) // SEQ
            if tokens[a] == bins.special["pad"]:
                assert set(tokens[a:b].tolist()) == {bins.special["pad"]} and b % SEQ == 0
                filler += 1
                continue
            assert tokens[a] == bins.special["cls"] and tokens[b - 1] == bins.special["sep"]
            inner = tokens[a + 1 : b - 1]
            assert len(inner) and (inner.diff() == 1).all() and inner[0] > 4
            lengths.append(b - a)
        assert batch.lengths.tolist() == lengths
        assert (batch.real_tokens, batch.attended) == (sum(lengths), sum(n * n for n in lengths))
        assert not batch.types.any()
    assert filler


def test_shapes_are_static(bins: TokenBins) -> None:
    shapes = {tuple(getattr(b, name).shape for name in SHAPES) for b in islice(loader(bins, rows=3), 400)}
    types = {tuple(getattr(b, name).dtype for name in SHAPES) for b in islice(loader(bins, rows=3), 3)}
    assert len(shapes) == 1
    assert types == {(torch.int64, torch.int64, torch.int64, torch.int32, torch.int64, torch.int64)}


def test_masking_shares(bins: TokenBins) -> None:
    data = loader(bins, rows=8)
    before, after, places = [], [], []
    real = 0
    for batch in islice(data, 1500):
        used = batch.labels != -100
        before.append(batch.labels[used])
        after.append(batch.tokens[batch.targets[used]])
        places.append(batch.targets[used] % SEQ)
        real += batch.real_tokens
        assert len(batch.targets[used].unique()) == int(used.sum())
    was, now = torch.cat(before), torch.cat(after)
    share = {
        "all": len(was) / real,
        "mask": (now == bins.special["mask"]).double().mean().item(),
        "same": (now == was).double().mean().item(),
    }
    assert (was > 4).all()  # special tokens are never predicted
    random = now[(now != was) & (now != bins.special["mask"])]
    assert (random > 4).all() and random.max() < bins.vocab_size
    assert share["all"] == pytest.approx(0.15, abs=0.01)
    assert share["mask"] == pytest.approx(0.8, abs=0.008)
    assert share["same"] == pytest.approx(0.1, abs=0.006)
    assert len(random) / len(was) == pytest.approx(0.1, abs=0.006)
    tenths = torch.bincount((random - 5) * 10 // (bins.vocab_size - 5), minlength=10) / len(random)
    assert (tenths - 0.1).abs().max() < 0.015
    # Uniform over the row: every inner slot is chosen about equally often (slot 0 is always [CLS]).
    chosen = torch.bincount(torch.cat(places), minlength=SEQ)[2:30].double()
    assert chosen.max() / chosen.min() < 1.25


def test_masks_change_with_the_epoch_and_the_seed_only(bins: TokenBins) -> None:
    tokens = np.tile(np.arange(5, 5 + SEQ), (6, 1))
    real = np.full(6, SEQ)
    masker = Masker(bins.vocabulary, SEQ, 0.15, seed=1)
    first = masker(tokens.copy(), np.arange(6), real)[0] % SEQ
    assert len({tuple(sorted(row)) for row in first.reshape(6, -1).tolist()}) > 4
    again = masker(tokens[:2].copy(), np.arange(4, 6), real[:2])[0] % SEQ
    assert np.array_equal(again, first.reshape(6, -1)[4:].ravel())
    other = Masker(bins.vocabulary, SEQ, 0.15, seed=2)(tokens.copy(), np.arange(6), real)[0] % SEQ
    assert not np.array_equal(first, other)


def test_rows_with_few_candidates_keep_the_shape(bins: TokenBins) -> None:
    masker = Masker(bins.vocabulary, SEQ, 0.5, seed=1)
    tokens = np.zeros((3, SEQ), dtype=np.int64)  # all filler
    tokens[1, :4] = [2, 77, 1, 3]  # one candidate: [CLS] 77 [UNK] [SEP]
    tokens[2, :8] = [2, 70, 71, 72, 73, 74, 75, 3]
    masked, labels = masker(tokens, np.arange(3), np.array([0, 4, 8]))
    assert masked.shape == labels.shape == (48,)
    counts = (labels.reshape(3, -1) != -100).sum(axis=1)
    assert counts.tolist() == [0, 1, 4]
    assert labels[labels != -100][0] == 77
    assert (masked < 3 * SEQ).all() and (masked >= 0).all()


def test_evaluation_is_the_same_rows_at_any_world_size(bins: TokenBins) -> None:
    def rows(rows: int, world: int, limit: int | None) -> list[tuple[bytes, ...]]:
        ranks = [
            eval_batches(bins, "heldout", Masked(), SEQ, rows, limit, rank, world, seed=3) for rank in range(world)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        assert len({tuple(getattr(b, name).shape for name in SHAPES) for rank in ranks for b in rank}) == 1
        found = [row for rank in ranks for batch in rank for row in rows_of(batch)]
        empty = torch.zeros(SEQ, dtype=torch.int64).numpy().tobytes()
        return sorted(row for row in found if row[0] != empty)

    whole = rows(4, 1, None)
    assert len(whole) == Loader(bins, "heldout", Masked(), SEQ, 1, 0, 1, 3).rows_per_epoch
    assert whole == rows(3, 2, None) == rows(1, 5, None) == rows(100, 3, None)
    assert rows(4, 1, 7) == rows(2, 3, 7) and len(rows(4, 1, 7)) == 7
    batches = [b for rank in range(2) for b in eval_batches(bins, "heldout", Masked(), SEQ, 4, None, rank, 2, seed=3)]
    assert all((b.labels != -100).any() for b in batches)
    ids, _ = bins.split("heldout")
    assert sum(int((original(b) > 4).sum()) for b in batches) == len(ids)


def test_read_ahead_does_not_show(bins: TokenBins, monkeypatch: pytest.MonkeyPatch) -> None:
    many = list(islice(loader(bins), 9))
    monkeypatch.setattr(module, "_BLOCK", 1)
    for a, b in zip(many, islice(loader(bins), 9), strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in SHAPES)
        assert np.array_equal(a.lengths, b.lengths)


def test_bad_arguments(bins: TokenBins) -> None:
    for rows, rank, world, message in (
        (0, 0, 1, "rows of a micro-batch: 0"),
        (4, 2, 2, "rank 2 of 2, expected 0 to 1"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            loader(bins, rows, rank, world)
    with pytest.raises(InvalidConfig, match=r"mlm_probability is 0\.01 with seq_len 32"):
        Loader(bins, "train", Masked(0.01), SEQ, 4, 0, 1, 5)
    with pytest.raises(InvalidConfig, match="evaluation rows is 0"):
        eval_batches(bins, "heldout", Masked(), SEQ, 2, 0, 0, 1, seed=0)


def test_a_token_outside_the_vocabulary(bins: TokenBins) -> None:
    file = bins.folder / "train.bin"
    file.write_bytes(b"\xff\xff" * (file.stat().st_size // 2))
    with pytest.raises(InvalidData, match="token id 65535, expected less than 9000"):
        next(loader(TokenBins.open(bins.folder)))
