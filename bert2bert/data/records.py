"""Documents out of `datasets` datasets: by hub name, from a table of records, or from a folder of them.

Every record is read like a small file. Refuses, with `InvalidData`: what cannot be opened, with the cause, and in a
local JSON-lines file the broken line; a column that is not there or does not hold text; a CSV table whose rows have
more fields than its header; pointers, other encodings and archives instead of a table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from bert2bert.data.text import DAMAGED, TABLES, Advance, Pieces, pieces, plain, table
from bert2bert.errors import InvalidData, did_you_mean
from bert2bert.files.sniff import describe, sniff

_TEXTUAL = ("json", "csv")  # builders whose files are text


@dataclass(frozen=True)
class Records:
    """The text column of a `datasets` dataset; every record is read like a small file."""

    data: Any
    column: str
    label: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how it was read."""
        text, found = self.data.data.column(self.column), []
        where = f"of {self.size:,} records"
        if text.null_count:
            found.append(f"{text.null_count:,} {where} have nothing in column '{self.column}'")
        if str(text.type) in ("string", "large_string") and (odd := pc.sum(pc.match_substring(text, "\r")).as_py()):
            found.append(f"{odd:,} {where} have line ends of Windows (\\r\\n) or \\r, read as \\n, as in text files")
        return tuple(f"dataset {self.label}: {note}" for note in found)

    @property
    def size(self) -> int:
        """Records, the unit of `documents`' progress."""
        return len(self.data)

    def documents(self, document: str, advance: Advance) -> Pieces:
        """The records' documents; `advance` receives how many more records were read."""
        some = False
        for number, record in enumerate(self._records(), 1):
            value = record[self.column]
            if value is not None and not isinstance(value, str):
                raise InvalidData(
                    f"dataset {self.label}: column '{self.column}' holds {type(value).__name__}, expected text (record"
                    f" {number:,}: {str(value)[:60]!r}).\n"
                    f"  Name a column of strings with --text-column; columns: {', '.join(self.data.column_names)}."
                )
            for text, ends in pieces(StringIO(value or "", newline=None), document):
                some = True
                yield text, ends
            advance(1)
        if not some:
            raise InvalidData(f"dataset {self.label}: column '{self.column}' holds no text.\n  Check --text-column.")

    def _records(self) -> Iterator[Any]:
        number = 0
        try:
            for record in self.data:
                yield record
                number += 1
        except (OSError, ValueError) as error:  # not UTF-8, a damaged file
            raise InvalidData(
                f"dataset {self.label}: record {number + 1:,} cannot be read: {error}.\n"
                "  Mend or leave out that record, or copy the file again."
            ) from error


def open_dataset(name: str, config: str | None, split: str | None, column: str | None) -> Records:
    """A dataset by hub name, by the path of a file of records (`TABLES`, compressed or not) or of a folder
    (`save_to_disk`'s, or one that `datasets.load_dataset` understands). Local ones need no network.

    `split` defaults to 'train', `column` to 'text'.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would draw over their own lines in a file
    split = split or "train"
    path = Path(name).expanduser()
    # "NA", "007" and "true" in a CSV table are words.
    words = {"keep_default_na": False, "converters": {column or "text": str}}
    kind = ""
    label = f"{name}" + (f" ({config})" if config else "") + f", split '{split}'"
    try:
        if path.is_file():
            suffix = _check(path, name)
            kind = TABLES[suffix]
            options = {**words, "sep": "\t" if suffix == ".tsv" else ","} if kind == "csv" else {}
            data = datasets.load_dataset(kind, data_files=str(path), split=split, **options)
        elif path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise InvalidData(f"dataset {name} has no split '{split}'; {did_you_mean(split, data)}")
                data = data[split]
        else:
            at = str(path) if path.is_dir() else name
            if type(datasets.load_dataset_builder(at, config).config).__name__ == "CsvConfig":
                kind = "csv"
            data = datasets.load_dataset(at, config, split=split, **(words if kind == "csv" else {}))
    except InvalidData:
        raise
    except Exception as error:  # datasets raises a dozen unrelated classes for what is wrong with a name or a file
        raise InvalidData(
            f"dataset {label} cannot be opened: {_cause(error, path)}\n"
            "  Expected the name of a dataset on the hub (with a network), or the path of a local file or folder.\n"
            "  Without a network: on a machine that has one, datasets.load_dataset(...).save_to_disk(FOLDER); then give"
            " --dataset FOLDER."
        ) from error
    header = [found for found in data.column_names if not found.startswith("__index_level_")]
    if kind == "csv" and len(header) < len(data.column_names):  # pandas took the first fields for an index
        raise InvalidData(
            f"dataset {label}: its first row has more fields than its header ({', '.join(header)}), so it is not sure"
            " which field is which.\n"
            "  Put quotes around fields that hold the separator, take separators from the ends of rows, and separate"
            " fields with commas (.csv) or tabs (.tsv)."
        )
    column = column or "text"
    if column not in data.column_names:
        raise InvalidData(
            f"dataset {label} has no column '{column}'; its columns: {', '.join(data.column_names)}.\n"
            "  Name the text column with --text-column."
        )
    return Records(data.select_columns([column]), column, label)


def _check(path: Path, name: str) -> str:
    """The suffix of a file of records; refuses at once what cannot be one."""
    suffix = table(path)
    if suffix is None:
        raise InvalidData(
            f"dataset {name} is a file of an unknown kind '{path.suffix}'.\n"
            f"  Known: {', '.join(TABLES)}. Plain text goes to --text."
        )
    try:
        if TABLES[suffix] in _TEXTUAL:
            with open(path, "rb") as raw:
                plain(raw, path, f"dataset {name}")
        elif sniff(path).kind in ("empty", "zeros", "git-lfs", "git-annex", "html", "text"):
            raise InvalidData(f"dataset {name} is {describe(path)}")
    except DAMAGED as error:
        raise InvalidData(f"dataset {name} cannot be read: {error or type(error).__name__}.") from error
    return suffix


def _cause(error: BaseException, path: Path) -> str:
    """What went wrong, under what `datasets` wraps it in."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{broken}\n  ({reason})" if (broken := _broken_line(path)) else reason


def _broken_line(path: Path) -> str | None:
    """Where a local file of JSON lines is broken, and how; None if it is another kind of file or whole."""
    if not path.is_file() or TABLES.get(table(path) or "") != "json":
        return None
    number, line = 0, ""
    try:
        with open(path, "rb") as raw, TextIOWrapper(plain(raw, path), "utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.lstrip().startswith("["):
                    return None
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"it holds a {type(record).__name__}, expected an object")
                json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        where = error.object[: error.start].count(10)
        return f"line {number + 1 + where:,} is not UTF-8: byte 0x{error.object[error.start]:02x}."
    except (ValueError, RecursionError) as error:
        return f"line {number:,} is not a JSON record: {error}: {line.strip()[:60]!r}."
    except DAMAGED as error:
        return f"it cannot be read after line {number:,}: {error or type(error).__name__}."
    return None
