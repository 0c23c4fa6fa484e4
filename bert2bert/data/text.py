"""Documents out of text files and `datasets` datasets, as a stream of bounded pieces.

A document is a whole file (or record), a block between blank lines, or a line. It arrives as pieces of whole lines of
about `PIECE` characters, each with a flag that says whether it ends its document, so a book or a dump of any size is
read in bounded memory (a single line is the smallest unit and is held whole).

Refuses, with `InvalidData`: files that are missing, unreadable, empty, damaged, not UTF-8, or not text at all.
"""

from __future__ import annotations

import gzip
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from bert2bert.errors import InvalidData, did_you_mean

DOCUMENTS = ("file", "blank-line", "line")
PIECE = 1 << 16

_TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".tsv": "csv"}

Pieces = Iterator[tuple[str, bool]]
Advance = Callable[[int], object]


def pieces(lines: Iterable[str], document: str) -> Pieces:
    """Cut lines (with their ends) into (text, ends its document); blank documents are left out.

    `document`: one of `DOCUMENTS`. A document longer than `PIECE` characters comes in several pieces; the last may be
    empty.
    """
    held: list[str] = []
    size, begun = 0, False
    for line in lines:
        blank = not line.strip()
        if not blank or (document == "file" and (held or begun)):
            held.append(line)
            size += len(line)
        if document == "line" or (document == "blank-line" and blank):
            if held or begun:
                yield "".join(held), True
            held, size, begun = [], 0, False
        elif size >= PIECE:
            yield "".join(held), False
            held, size, begun = [], 0, True
    if held or begun:
        yield "".join(held), True


@dataclass(frozen=True)
class TextFile:
    """One UTF-8 text file: plain, .gz or .xz."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes on disk, the unit of `documents`' progress."""
        return self.path.stat().st_size

    def check(self) -> None:
        """Refuse at once what cannot be a text file."""
        if not self.path.exists():
            raise InvalidData(f"text file {self.path} does not exist.\n  Give the path of a .txt, .gz or .xz file.")
        if self.path.is_dir():
            raise InvalidData(f"text file {self.path} is a folder.\n  Give its files, for example {self.path}/*.txt.")
        if self.path.suffix.lower() in _TABLES:
            raise InvalidData(
                f"text file {self.path} is a {self.path.suffix} table, not plain text.\n"
                f"  Give it as --dataset {self.path} (and --text-column if its column is not 'text')."
            )
        if self.size == 0:
            raise InvalidData(f"text file {self.path} is empty (0 bytes).\n  Leave it out or give the full file.")

    def documents(self, document: str, advance: Advance) -> Pieces:
        """The file's documents; `advance` is told how many more bytes of the file were read."""
        some = False
        for text, ends in pieces(self._lines(advance), document):
            some = True
            yield text, ends
        if not some:
            raise InvalidData(f"text file {self.path} holds only blank lines.\n  Leave it out or give the full file.")

    def _lines(self, advance: Advance) -> Iterator[str]:
        number, told = 0, 0
        try:
            with open(self.path, "rb") as raw, TextIOWrapper(_decompressed(raw, self.path), "utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if "\0" in line:
                        raise InvalidData(
                            f"text file {self.path} has a NUL character in line {number}: it is binary or UTF-16.\n"
                            "  Expected UTF-8 text, plain or in .gz or .xz."
                        )
                    yield line
                    if not number % 256:
                        advance(raw.tell() - told)
                        told = raw.tell()
                advance(raw.tell() - told)
        except UnicodeDecodeError as error:
            raise InvalidData(
                f"text file {self.path} is not UTF-8: byte 0x{error.object[error.start]:02x} after line {number}.\n"
                "  Convert it first, for example: iconv -f LATIN1 -t UTF-8."
            ) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise InvalidData(
                f"text file {self.path} cannot be read after line {number}: {error or type(error).__name__}.\n"
                "  Expected a readable file, and a complete one if it is compressed (.gz, .xz)."
            ) from error


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    return raw


@dataclass(frozen=True)
class Records:
    """The text column of a `datasets` dataset; every record is read like a small file."""

    data: Any
    column: str
    label: str

    @property
    def size(self) -> int:
        """Records, the unit of `documents`' progress."""
        return len(self.data)

    def documents(self, document: str, advance: Advance) -> Pieces:
        """The records' documents; `advance` is told how many more records were read."""
        some = False
        for record in self.data:
            value = record[self.column]
            if value is not None and not isinstance(value, str):
                raise InvalidData(
                    f"dataset {self.label}: column '{self.column}' holds {type(value).__name__}, expected text.\n"
                    f"  Name a column of strings with --text-column; columns: {', '.join(self.data.column_names)}."
                )
            for text, ends in pieces((value or "").splitlines(keepends=True), document):
                some = True
                yield text, ends
            advance(1)
        if not some:
            raise InvalidData(f"dataset {self.label}: column '{self.column}' holds no text.\n  Check --text-column.")


def open_dataset(name: str, config: str | None, split: str | None, column: str | None) -> Records:
    """A dataset by hub name, by the path of a .json, .jsonl, .parquet, .csv, .tsv or .arrow file, or of a folder
    (`save_to_disk`'s, or one that `datasets.load_dataset` understands). Local ones need no network.

    `split` defaults to 'train', `column` to 'text'.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would draw over their own lines in a file
    split = split or "train"
    path = Path(name).expanduser()
    label = f"{name}" + (f" ({config})" if config else "") + f", split '{split}'"
    try:
        if path.is_file():
            if path.suffix.lower() not in _TABLES:
                raise InvalidData(
                    f"dataset {name} is a file of an unknown kind '{path.suffix}'.\n"
                    f"  Known: {', '.join(_TABLES)}. Plain text goes to --text."
                )
            builder = _TABLES[path.suffix.lower()]
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            data = datasets.load_dataset(builder, data_files=str(path), split=split, **options)
        elif path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise InvalidData(f"dataset {name} has no split '{split}'; {did_you_mean(split, data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except InvalidData:
        raise
    except Exception as error:  # datasets raises a dozen unrelated classes for what is wrong with a name or a file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidData(
            f"dataset {label} cannot be opened: {type(error).__name__}: {first}\n"
            "  Expected the name of a dataset on the hub (with a network), or the path of a local file or folder.\n"
            "  Without a network: on a machine that has one, datasets.load_dataset(...).save_to_disk(FOLDER); then give"
            " --dataset FOLDER."
        ) from error
    column = column or "text"
    if column not in data.column_names:
        raise InvalidData(
            f"dataset {label} has no column '{column}'; its columns: {', '.join(data.column_names)}.\n"
            "  Name the text column with --text-column."
        )
    return Records(data.select_columns([column]), column, label)
