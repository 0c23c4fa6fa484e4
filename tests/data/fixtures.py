"""Bins with documents of chosen lengths, without a tokenizer run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bert2bert.data.bins import FORMAT_VERSION, TokenBins, blake, token_dtype


def write_bins(
    folder: Path,
    lengths: Sequence[int],
    vocab_size: int,
    heldout: Sequence[int] = (40,),
    distinct: bool = False,
    sentinels: int = 0,
    add_bos: bool = False,
) -> TokenBins:
    """Random tokens 5 … vocab_size - sentinels - 1 (ids 0 to 4 are special, the last ones sentinels); `distinct`: token
    i of the train split is 5 + i."""
    folder.mkdir()
    dtype = token_dtype(vocab_size)
    rng = np.random.default_rng(0)
    splits = {}
    for split, sizes in (("train", lengths), ("heldout", heldout)):
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = int(offsets[-1])
        ids = (
            np.arange(5, total + 5) if distinct and split == "train" else rng.integers(5, vocab_size - sentinels, total)
        )
        (folder / f"{split}.bin").write_bytes(ids.astype(dtype).tobytes())
        np.save(folder / f"{split}.idx.npy", offsets)
        splits[split] = {"tokens": total, "documents": len(sizes), "unigram_entropy": 1.0}
    (folder / "tokenizer.json").write_text("{}")
    meta = {
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "special": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": 2, "eos": 3},
        "sentinels": [vocab_size - 1 - i for i in range(sentinels)],
        "add_bos": add_bos,
        "tokenizer_digest": blake([b"{}"]),
        "digest": "0",
        "splits": splits,
        "sources": [],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenBins.open(folder)
