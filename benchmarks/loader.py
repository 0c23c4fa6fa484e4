"""How fast the loader feeds one rank, next to transformers' masked-LM collator in the same run.

    python benchmarks/loader.py [--objective masked] [--seq-len 512] [--rows 32] [--documents 200000] [--seconds 3]
        [--bins FOLDER] [--json]

Without --bins it makes token bins with article-like document lengths (log-normal, median 270 tokens) in a temporary
folder. Reported per core: tokens per second of CPU time of `Loader` (reading, packing into rows, what the objective
predicts, tensors), fill of the packing, time to compose the rows and to draw an epoch, tokens per second of
`DataCollatorForLanguageModeling` on ready-made rows of the same size, and the ratio. Goal: at least 10 M tokens/s and
99 % fill. The best of ten measurements is taken for both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from bert2bert.data.bins import FORMAT_VERSION, TokenBins, blake, token_dtype
from bert2bert.data.loader import Loader
from bert2bert.data.objective import OBJECTIVES, Objective
from bert2bert.data.packing import Packer
from bert2bert.terminal.arguments import Parser

VOCAB_SIZE = 30522
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SENTINELS = 100


def synthetic_bins(folder: Path, documents: int) -> TokenBins:
    """Random tokens in documents with article-like lengths."""
    rng = np.random.default_rng(0)
    dtype = token_dtype(VOCAB_SIZE)
    splits = {}
    for split, count in (("train", documents), ("heldout", 10)):
        offsets = np.concatenate([[0], np.cumsum(np.maximum(1, rng.lognormal(5.6, 1.2, count)).astype(np.int64))])
        rng.integers(5, VOCAB_SIZE - SENTINELS, offsets[-1]).astype(dtype).tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.idx.npy", offsets)
        splits[split] = {"tokens": int(offsets[-1]), "documents": count}
    (folder / "tokenizer.json").write_text("{}")
    meta = {
        "format_version": FORMAT_VERSION,
        "vocab_size": VOCAB_SIZE,
        "dtype": dtype.name,
        "special": {**SPECIAL, "eos": 3},
        "sentinels": [VOCAB_SIZE - 1 - i for i in range(SENTINELS)],
        "tokenizer_digest": blake([b"{}"]),
        "digest": "",
        "splits": splits,
        "sources": [],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenBins.open(folder)


def best_rate(step: Callable[[], Any], tokens: int, seconds: float) -> float:
    """Tokens per second of `step`, the best tenth of the time."""
    step()
    best = 0.0
    for _ in range(10):
        count, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds / 10 or not count:
            step()
            count += 1
        best = max(best, count * tokens / spent)
    return best


def collator(rows: int, seq_len: int) -> Callable[[], Any]:
    """transformers' collator on rows that are already packed lists of ids, as its documentation uses it."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    vocab = {f"[{key.upper()}]": i for key, i in SPECIAL.items()} | {f"t{i}": i for i in range(5, VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")),
        **{f"{key}_token": f"[{key.upper()}]" for key in SPECIAL},
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    ids = np.random.default_rng(0).integers(5, VOCAB_SIZE, (rows, seq_len))
    ids[:, 0], ids[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
    examples = [{"input_ids": row} for row in ids.tolist()]
    return lambda: collate([dict(example) for example in examples])


def measure(bins: TokenBins, objective: Objective, seq_len: int, rows: int, seconds: float) -> dict[str, Any]:
    tokens, offsets = bins.split("train")
    start = time.process_time()
    packer = Packer(offsets, seq_len, 0, objective.frame(bins.vocabulary))
    composed = time.process_time()
    packer.segments(np.arange(1))
    drawn = time.process_time()
    loader = Loader(bins, "train", objective, seq_len, rows, rank=0, world=1, seed=0)
    ours = best_rate(lambda: next(loader), rows * seq_len, seconds)
    theirs = best_rate(collator(rows, seq_len), rows * seq_len, seconds)
    return {
        "objective": objective.kind,
        "seq_len": seq_len,
        "rows": rows,
        "corpus_tokens": len(tokens),
        "fill": packer.fill,
        "compose_seconds": composed - start,
        "epoch_seconds": drawn - composed,
        "loader_tokens_per_s": ours,
        "collator_tokens_per_s": theirs,
        "ratio": ours / theirs,
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {objective.kind: objective for objective in OBJECTIVES}
    parser.add_argument("--objective", choices=kinds, default="masked")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--bins", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bins = TokenBins.open(args.bins) if args.bins else synthetic_bins(Path(folder), args.documents)
        found = measure(bins, kinds[args.objective], args.seq_len, args.rows, args.seconds)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['corpus_tokens'] / 1e6:.1f} M tokens, rows of {found['seq_len']}, {found['rows']} a micro-batch")
    print(f"fill {found['fill']:.2%}")
    print(f"rows composed in {found['compose_seconds']:.2f} s, an epoch drawn in {found['epoch_seconds']:.2f} s")
    print(
        f"Loader ({found['objective']}) {found['loader_tokens_per_s'] / 1e6:.1f} M tokens/s,"
        f" DataCollatorForLanguageModeling {found['collator_tokens_per_s'] / 1e6:.2f} M tokens/s:"
        f" {found['ratio']:.0f} times"
    )


if __name__ == "__main__":
    main()
