"""Objectives: documents whole again from what a model reads and predicts, shapes, randomness, and what does not fit.

Span corruption is compared with the steps of T5's preprocessing, re-derived here token by token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader, eval_batches
from bert2bert.data.objective import Causal, Masked, Objective, SpanCorruption, check, check_run, lacks, uses
from bert2bert.data.packing import Packer
from bert2bert.data.rows import Rows
from bert2bert.data.spans import Corrupter
from bert2bert.data.vocabulary import Vocabulary
from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import Batch
from tests.data.fixtures import write_bins

SEQ, PAD, BOS, EOS, VOCAB, SENTINELS = 32, 0, 2, 3, 12000, 10
LENGTHS = [1 + i * 37 % 150 for i in range(120)]
FIELDS = ("tokens", "positions", "types", "cu_seqlens", "labels")


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def bins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenBins:
    folder = tmp_path_factory.mktemp("bins") / "bins"
    return write_bins(
        folder, LENGTHS, VOCAB, heldout=LENGTHS[::5], distinct=True, sentinels=SENTINELS, add_bos=request.param
    )


def loader(
    bins: TokenBins, objective: Objective, rows: int = 4, rank: int = 0, world: int = 1, seed: int = 5
) -> Loader:
    return Loader(bins, "train", objective, SEQ, rows, rank, world, seed)


def epoch(bins: TokenBins, objective: Objective, rows: int = 1) -> list[Batch]:
    data = loader(bins, objective, rows)
    return list(islice(data, data.rows_per_epoch // rows))


def pieces(cu_seqlens: torch.Tensor, *flat: torch.Tensor) -> Iterable[tuple[list[int], ...]]:
    """The sequences of flat tensors."""
    for a, b in pairwise(cu_seqlens.tolist()):
        if a < b:
            yield tuple(part[a:b].tolist() for part in flat)


def digest(batches: Iterable[Batch]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for name in ("tokens", "positions", "types", "cu_seqlens", "targets", "labels"):
            found.update(getattr(batch, name).numpy().tobytes())
        found.update(batch.lengths.tobytes())
    return found.hexdigest()


def test_masked_rows_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Recorded with the loader that knew masked tokens only, from bins of format version 1."""
    folder = write_bins(tmp_path / "bins", LENGTHS, 9000, heldout=LENGTHS[::5]).folder
    for split, lengths in (("train", LENGTHS), ("heldout", LENGTHS[::5])):
        (folder / f"{split}.bin").write_bytes((np.arange(sum(lengths)) % 8000 + 5).astype(np.uint16).tobytes())
    meta = json.loads((folder / "meta.json").read_text())
    special = {role: index for role, index in meta["special"].items() if role not in ("bos", "eos")}
    old = {key: value for key, value in meta.items() if key not in ("sentinels", "add_bos")}
    (folder / "meta.json").write_text(json.dumps(old | {"format_version": 1, "special": special}))
    bins = TokenBins.open(folder)
    assert digest(islice(Loader(bins, "train", Masked(), SEQ, 4, 0, 1, 5), 300)) == "cfe821354ec4b015"
    assert digest(islice(Loader(bins, "train", Masked(0.4), SEQ, 3, 1, 2, 0), 300)) == "1472552256dc281d"
    assert digest(eval_batches(bins, "heldout", Masked(), SEQ, 4, None, 1, 2, 3)) == "2efbc0d26d78343a"
    with pytest.raises(
        InvalidConfig, match=r"older version, which record BERT's roles only\) has no eos token.*eos_token"
    ):
        check(Causal(), bins.vocabulary)


def test_causal_documents_have_their_ends_and_are_whole(bins: TokenBins) -> None:
    """Every document begins and ends once, a cut one goes on elsewhere without a false end; a token predicts the next
    of its own segment and the last one nothing."""
    ids, offsets = bins.split("train")
    begins, ends = set(offsets[:-1].tolist()), set(offsets[1:].tolist())
    seen: Counter[int] = Counter()
    segments = filler = 0
    for batch in epoch(bins, Causal()):
        assert batch.targets is None and batch.labels.shape == batch.tokens.shape == (SEQ,)
        lengths = []
        for tokens, labels, positions in pieces(batch.cu_seqlens, batch.tokens, batch.labels, batch.positions):
            assert positions == list(range(len(tokens)))
            if tokens[0] == PAD:
                assert set(tokens) == {PAD} and set(labels) == {-100}
                filler += 1
                continue
            assert labels == [*tokens[1:], -100]
            opens, closes = tokens[0] == BOS, tokens[-1] == EOS
            text = tokens[opens : len(tokens) - closes]
            assert text == [token for token in tokens if token > 4] and set(np.diff(text)) <= {1}
            assert not (text and opens) or text[0] - 5 in begins
            assert not (text and closes) or text[-1] - 4 in ends
            seen.update(tokens)
            lengths.append(len(tokens))
        segments += len(lengths)
        assert batch.lengths.tolist() == lengths
    assert filler and seen == Counter(
        [*ids.tolist(), *[EOS] * len(LENGTHS), *[BOS] * len(LENGTHS) * bins.vocabulary.add_bos]
    )
    cuts = Packer(offsets, SEQ, 5, Causal().frame(bins.vocabulary)).pieces()
    assert cuts.sum() == segments and loader(bins, Causal()).cut == (cuts > 1).mean() < 1
    assert (cuts >= np.ceil((np.array(LENGTHS) + 1 + bins.vocabulary.add_bos) / SEQ)).all()


def test_shapes_are_static(bins: TokenBins) -> None:
    for objective in (Masked(), Causal()):
        shapes = {tuple(getattr(b, name).shape for name in FIELDS) for b in islice(loader(bins, objective, 3), 300)}
        assert len(shapes) == 1


@pytest.mark.parametrize("objective", [Causal(), SpanCorruption()], ids=lambda objective: objective.kind)
def test_data_do_not_depend_on_ranks_and_go_on_where_they_stood(bins: TokenBins, objective: Objective) -> None:
    def sequences(batch: Batch) -> list[tuple[list[int], ...]]:
        if batch.decoder is None:
            return list(pieces(batch.cu_seqlens, batch.tokens, batch.labels))
        written = pieces(batch.decoder.cu_seqlens, batch.decoder.tokens, batch.labels)
        return [a + b for a, b in zip(pieces(batch.cu_seqlens, batch.tokens), written, strict=True)]

    alone = [found for batch in islice(loader(bins, objective, rows=12), 4) for found in sequences(batch)]
    for rows, world in ((4, 3), (1, 12), (2, 1)):
        ranks = [loader(bins, objective, rows=rows, rank=rank, world=world) for rank in range(world)]
        for data in ranks:
            data.load_state({"rows": 12})
        steps = range(36 // (rows * world))
        again = [found for _ in steps for rank in ranks for found in sequences(next(rank))]
        assert again == alone[-len(again) :] and len(again) > len(alone) / 2, (rows, world)
    other = [found for batch in islice(loader(bins, objective, rows=12, seed=6), 4) for found in sequences(batch)]
    assert other != alone
    whole, spread = ([b for r in range(n) for b in eval_batches(bins, "heldout", objective, SEQ, 4, None, r, n, 0)]
                     for n in (1, 3))  # fmt: skip
    real = [
        sorted(found for b in batches for found in sequences(b) if found[0][0] != PAD) for batches in (whole, spread)
    ]
    assert real[0] == real[1]


def t5(text: list[int], noise: list[bool], sentinels: list[int]) -> tuple[list[int], list[int]]:
    """noise_span_to_unique_sentinel and nonnoise_span_to_unique_sentinel of T5's preprocessing, an end token behind."""

    def replaced(hidden: list[bool]) -> list[int]:
        found, count = [], 0
        for i, token in enumerate(text):
            if not hidden[i]:
                found.append(token)
            elif i == 0 or not hidden[i - 1]:
                found.append(sentinels[count])
                count += 1
        return [*found, EOS]

    return replaced(noise), replaced([not hidden for hidden in noise])


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """The numbers of random_spans_noise_mask: noise tokens and spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(round(noise / mean), 1)


@pytest.mark.parametrize("objective", [SpanCorruption(), SpanCorruption(0.3, 1.5)], ids=["paper", "dense"])
def test_span_corruption_is_t5s(bins: TokenBins, objective: SpanCorruption) -> None:
    sentinels = [VOCAB - 1 - i for i in range(SENTINELS)]
    seen: list[int] = []
    for batch in epoch(bins, objective, rows=3):
        decoder = batch.decoder
        assert decoder is not None and batch.targets is None and len(batch.labels) == len(decoder.tokens)
        read = list(pieces(batch.cu_seqlens, batch.tokens, batch.positions))
        written = list(pieces(decoder.cu_seqlens, decoder.tokens, batch.labels))
        assert batch.lengths.tolist() == [len(part[0]) for part in read] and max(batch.lengths) <= batch.max_seqlen
        assert (
            decoder.lengths.tolist() == [len(part[0]) for part in written]
            and max(decoder.lengths) <= decoder.max_seqlen
        )
        for (tokens, positions), (shifted, labels) in zip(read, written, strict=True):
            assert positions == list(range(len(tokens))) and shifted == [PAD, *labels[:-1]]
            held: dict[int, list[int]] = {}  # sentinel -> what it replaced
            for token in labels[:-1]:
                if token in sentinels:
                    held[token] = []
                else:
                    held[next(reversed(held))].append(token)
            text, noise = [], []
            for token in tokens[:-1]:
                kept = held.get(token, [token])
                text += kept
                noise += [token in held] * len(kept)
            assert text == list(range(text[0], text[0] + len(text)))
            if len(text) > 1:
                assert (sum(noise), len(held)) == t5_counts(
                    len(text), objective.noise_density, objective.mean_span_length
                )
                assert not noise[0] and noise[-1]
            assert (tokens, labels) == t5(text, noise, sentinels)
            seen += text
    assert set(seen) <= set(range(5, VOCAB)) and len(seen) == len(set(seen)) > 0.95 * sum(LENGTHS)


def test_spans_are_drawn_uniformly() -> None:
    """Every arrangement of 3 spans of 5 noise tokens in 12 is equally likely, and does not depend on its batch."""
    corrupt = Corrupter((99, 98, 97), EOS, PAD, density=5 / 12, mean=5 / 3, seed=1)
    count = 6000
    rows = np.tile(np.arange(10, 22), (count, 1))
    found = corrupt(Rows.whole(rows.copy(), 0))
    read = found.read.tokens[0].reshape(count, -1)
    seen = Counter(map(tuple, read.tolist()))
    cuts = [len(list(combinations(range(parts - 1), 2))) for parts in (5, 7)]  # of noise, of text
    assert len(seen) == cuts[0] * cuts[1] == 90
    expected = count / len(seen)
    chi2 = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi2 < 150  # 89 degrees of freedom: exceeded by chance once in 20,000
    alone = corrupt(Rows.whole(rows[:1].copy(), 4321))
    assert alone.read.tokens[0].tolist() == read[4321].tolist()


def test_a_text_of_one_token_and_a_batch_without_any(tmp_path: Path) -> None:
    bins = write_bins(tmp_path / "bins", [1], 60, heldout=[1], sentinels=5)
    batch, empty = eval_batches(bins, "heldout", SpanCorruption(), 8, 1, None, 0, 1, 0)[0], None
    assert batch.tokens[-1] == EOS and len(batch.tokens) == 2 and batch.labels.tolist() == [59, EOS]
    for rank in range(2):
        batch = eval_batches(bins, "heldout", SpanCorruption(), 8, 1, None, rank, 2, 0)[0]
        empty = batch if not len(batch.lengths) else empty
    assert empty is not None and empty.decoder is not None and empty.real_tokens == 0
    assert empty.tokens.tolist() == empty.decoder.tokens.tolist() == [PAD] and empty.labels.tolist() == [-100]
    assert empty.cu_seqlens.tolist() == empty.decoder.cu_seqlens.tolist() == [0, 1]


LLAMA = Vocabulary(100, {"bos": 1, "eos": 2, "unk": 0}, add_bos=True, where="the tokenizer of bins/text")
BERT = Vocabulary(100, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, where="the tokenizer of bins/text")
T5 = Vocabulary(100, {"pad": 0, "eos": 1, "unk": 2}, sentinels=(99, 98), where="the tokenizer of bins/text")


def test_a_tokenizer_that_does_not_fit() -> None:
    for objective, vocabulary, message in (
        (
            Masked(),
            LLAMA,
            "bins/text has no pad, cls, sep or mask token, which the objective 'masked' needs",
        ),
        (Causal(), BERT, "has no eos token.*Name the token that ends a document.*eos_token.*prepare"),
        (SpanCorruption(), LLAMA, r"no pad token and no sentinels \(<extra_id_0>.*T5"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            check(objective, vocabulary)
    assert [lacks(o, v) for o, v in ((Masked(), BERT), (Causal(), LLAMA), (SpanCorruption(), T5))] == [""] * 3
    assert uses(LLAMA) == (
        "causal; not masked (no pad, cls, sep or mask token); not span-corruption (no pad token and no sentinels "
        "(<extra_id_0>, …))"
    )
    assert LLAMA.filler in (0, 1, 2)


def test_a_row_or_a_model_that_does_not_fit() -> None:
    check_run(SpanCorruption(), T5, 45, {"decoder_start_token_id": 0})
    for given, message in (
        (
            (SpanCorruption(), T5, 64, {}),
            "rows of 64 tokens have up to 3 spans .* bins/text has 2 sentinels: use a shorter",
        ),
        (
            (SpanCorruption(), T5, 45, {"decoder_start_token_id": 5}),
            "decoder_start_token_id is 5, but the padding .* is 0",
        ),
        ((Masked(0.01), BERT, 32, {}), "mlm_probability is 0.01 with seq_len 32"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            check_run(*given)
    for make, message in (
        (lambda: Masked(1.0), "objective.mlm_probability is 1.0"),
        (lambda: SpanCorruption(noise_density=0), "objective.noise_density is 0"),
        (lambda: SpanCorruption(mean_span_length=0.5), "objective.mean_span_length is 0.5"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            make()
