"""The command ``prepare``: from text to token bins, and what is in them in a few lines.

Refuses a book that is not in the embedded corpus, and what `data.prepare` refuses.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from bert2bert.data.corpus import books
from bert2bert.data.prepare import prepare
from bert2bert.errors import InvalidData, did_you_mean

HELDOUT_FRACTION = 0.01
"""Share of the documents that is held out if neither it nor a text to hold out is given."""


def run(args: Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the bins that the command line describes. Returns the bins' description, as ``--json`` prints it."""
    text, heldout, fraction = args.text, args.heldout_text, args.heldout_fraction
    if args.corpus:
        shelf = books()
        if args.corpus not in shelf:
            near = did_you_mean(args.corpus, shelf)
            raise InvalidData(f"--corpus {args.corpus!r} is not a book of the embedded corpus; {near}")
        text = [path for name, path in shelf.items() if name != args.corpus]
        heldout = [shelf[args.corpus]]
    if fraction is None:
        fraction = 0.0 if heldout else HELDOUT_FRACTION
    meta = prepare(
        text=text,
        dataset=args.dataset,
        dataset_config=args.dataset_config,
        dataset_split=args.dataset_split,
        text_column=args.text_column,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        heldout_text=heldout,
        heldout_fraction=fraction,
        document=args.document,
        output=args.output,
        seed=args.seed,
        progress=not args.quiet,
    )
    for name, split in meta["splits"].items():
        say(f"{name:8} {split['tokens']:,} tokens in {split['documents']:,} documents")
    entropy = meta["splits"].get("heldout", {}).get("unigram_entropy")
    if entropy is not None:
        say(f"held out: unigram entropy {entropy:.4f} nats a token; a model below it has learnt context")
    say(f"written  {args.output}")
    return {"output": args.output, **meta}
