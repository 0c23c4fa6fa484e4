"""All sources as one stream of documents, each on its side: to train on, or held out.

Held out are named files, or a fraction of the documents chosen by a keyed hash of their text (of the first piece of a
long one), so that exact duplicates never lie on both sides. Where whole files are the documents and the fraction would
take none of them, the smallest file is held out, with its copies.

Refuses a single file, or copies of one, as the only document: nothing would be left on one of the two sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from bert2bert.data.records import Records
from bert2bert.data.text import TextFile
from bert2bert.errors import InvalidData
from bert2bert.terminal.progress import progress

Source = TextFile | Records


class Stream:
    """The sources as one stream of (piece of text, split, ends its document), readable again and again."""

    def __init__(
        self,
        train: list[Source],
        heldout: list[Source],
        fraction: float,
        document: str,
        seed: int,
        progress: bool,
    ) -> None:
        self.sources = [(source, None if fraction else "train") for source in train]
        self.sources += [(source, "heldout") for source in heldout]
        self.document, self.progress, self.fraction = document, progress, fraction
        self.key = blake2b(f"heldout {seed}".encode(), digest_size=32).digest()
        self.limit = fraction * 2**64
        self.named: int | None = None  # the hash of a file that is held out whatever the fraction

    def hold_out_one(self) -> str | None:
        """See to it that at least one file is held out where whole files are the documents; the line that reports it.

        Reads the files' beginnings until one of them is held out by the fraction. Raises InvalidData if the files hold
        one and the same text.
        """
        files = [source for source, side in self.sources if isinstance(source, TextFile) and side is None]
        if self.document != "file" or not 0 < len(files) == len(self.sources):
            return None
        values: dict[int, TextFile] = {}
        for file in files:
            value = self._value(next(file.documents("file", lambda count: None))[0])
            if value < self.limit:
                return None
            values.setdefault(value, file)
        if len(values) == 1:
            raise InvalidData(too_few("heldout", len(files), self.fraction))
        self.named = min(values, key=lambda value: (values[value].size, value))
        return (
            f"--heldout-fraction {self.fraction:g} takes none of {len(files)} documents; the smallest is held out, "
            f"{values[self.named].path} (--heldout-text names another, --document blank-line makes smaller documents)"
        )

    def read(self, what: str) -> Iterator[tuple[str, str, bool]]:
        for source, side in self.sources:
            name = source.path.name if isinstance(source, TextFile) else source.label
            unit = "B" if isinstance(source, TextFile) else "rec"
            with progress(source.size, f"{what}: {name}", unit, self.progress) as bar:
                split = side
                for piece, ends in source.documents(self.document, bar.update):
                    split = split or self._draw(piece)
                    yield piece, split, ends
                    if ends:
                        split = side

    def _draw(self, piece: str) -> str:
        value = self._value(piece)
        return "heldout" if value < self.limit or value == self.named else "train"

    def _value(self, piece: str) -> int:
        return int.from_bytes(blake2b(piece.strip().encode(), key=self.key, digest_size=8).digest(), "big")

    def describe(self) -> list[dict[str, Any]]:
        """Where the text came from, for meta.json."""
        found: list[dict[str, Any]] = []
        for source, side in self.sources:
            split = side or f"{self.fraction:g} held out"
            if isinstance(source, TextFile):
                found.append({"text": str(source.path), "bytes": source.size, "split": split})
            else:
                found.append({"dataset": source.label, "column": source.column, "records": source.size, "split": split})
        return found


def too_few(split: str, documents: int, fraction: float) -> str:
    """What is wrong and what to do when a fraction leaves a split without a document."""
    count = f"none of the {documents} documents" if documents > 1 else "nothing of the only document"
    return (
        f"split '{split}' got {count} with --heldout-fraction {fraction:g}.\n"
        "  Use smaller documents (--document blank-line), another fraction or --seed, or name --heldout-text."
    )
