"""A tiny tokenizer of GPT-2's kind for the demo: byte-level BPE, trained on the embedded novels but one.

`bert2bert prepare --tokenizer FOLDER` takes what it writes. Who has a model has its tokenizer, and needs no such step.
Refuses a book that is not in the embedded corpus.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bert2bert.data.corpus import books
from bert2bert.terminal.arguments import Parser

END = "<|endoftext|>"


def write(texts: list[str], vocab_size: int, folder: Path) -> int:
    """Train a tokenizer, write its folder, return its number of tokens: every byte, what ends a document (id 0), and
    merges as far as vocab_size goes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="launch/demo_tokenizer.py",
        description="Train a byte-level tokenizer on the embedded novels except one.",
        epilog="example:\n  python launch/demo_tokenizer.py --corpus persuasion --output demo_out/gpt2_tokenizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", required=True, choices=books(), metavar="BOOK", help="the novel that is left out")
    parser.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="default: 1024; at least 257")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for it")
    options = parser.parse_args(argv)
    texts = [lzma.decompress(path.read_bytes()).decode() for name, path in books().items() if name != options.corpus]
    print(f"written  {options.output}: {write(texts, options.vocab_size, options.output):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
