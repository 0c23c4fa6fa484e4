"""Options of ``prepare``: text and its tokenizer."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def prepare(p: ArgumentParser) -> None:
    """Of ``prepare``."""
    origin = p.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files in UTF-8: plain, .gz, .bz2 or .xz"
    )
    origin.add_argument(
        "--dataset", metavar="NAME", help="a dataset of the Hugging Face Hub, or a local folder or file of one"
    )
    origin.add_argument(
        "--corpus", metavar="BOOK", help="the seven novels that come with this program (such as emma); BOOK is held out"
    )
    p.add_argument("--dataset-config", metavar="NAME", help="the dataset's configuration, if it has several")
    p.add_argument("--dataset-split", default="train", metavar="NAME", help="the dataset's split (default: train)")
    p.add_argument("--text-column", default="text", metavar="NAME", help="the dataset's column of text (default: text)")
    p.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a Hugging Face folder, tokenizer.json or vocab.txt (default: train a tokenizer on the text)",
    )
    p.add_argument(
        "--vocab-size",
        type=int,
        default=30522,
        metavar="N",
        help="number of tokens of the tokenizer that is trained; unused with --tokenizer (default: 30522)",
    )
    p.add_argument("--heldout-text", nargs="+", type=Path, default=[], metavar="FILE", help="text files to hold out")
    p.add_argument(
        "--heldout-fraction",
        type=float,
        metavar="F",
        help="share of the documents to hold out, between 0 and 1 (default: 0.01, or none with --heldout-text or "
        "--corpus)",
    )
    p.add_argument(
        "--document",
        choices=("file", "blank-line", "line"),
        default="file",
        help="what ends a document: the file's end (default), a blank line, or every line's end; line ends are \\n, "
        "\\r\\n and \\r, and all are read as \\n, in records too",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed that chooses the held-out documents (default: 0)"
    )
    p.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of token bins to write; must be new"
    )
