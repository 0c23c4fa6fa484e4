"""Documents out of text files, as a stream of bounded pieces.

A document is a whole file (or record), a block between blank lines, or a line; lines end at \\n, \\r\\n or \\r and
nowhere else, in files and in records alike. It arrives as pieces of whole lines of about `PIECE` characters, each with
a flag that says whether it ends its document, so a book or a dump of any size is read in bounded memory (a single line
is the smallest unit and is held whole). The pieces of a document joined are its text, without the end of its last line.

Refuses, with `InvalidData`: files that are missing, unreadable, empty, damaged, not UTF-8, or not text at all.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from bert2bert.errors import InvalidData
from bert2bert.files.sniff import START, kind_of, phrase

DOCUMENTS = ("file", "blank-line", "line")
PIECE = 1 << 16

TABLES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_OPENED: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)
_PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
# what turns CESU-8 into UTF-8; iconv has no name for it, and a half without its other becomes U+FFFD
_JOIN = (
    "python3 -c \"import sys; b = sys.stdin.buffer.read().decode('utf-8', 'surrogatepass'); "
    "sys.stdout.buffer.write(b.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode())\" < FILE > NEW"
)
_OLDER = ("windows-1252", "windows-1251", "shift_jis", "gb18030", "euc-kr")

Pieces = Iterator[tuple[str, bool]]
Advance = Callable[[int], object]


def pieces(lines: Iterable[str], document: str) -> Pieces:
    """Cut lines (with their ends, all \\n) into (text, ends its document); blank documents are left out.

    `document`: one of `DOCUMENTS`. A document longer than `PIECE` characters comes in several pieces; the last may be
    empty.
    """
    held: list[str] = []
    size, begun = 0, False
    gap = ""  # the end of the last line and blank lines behind it: text if the document goes on
    for line in lines:
        content = line.removesuffix("\n")
        blank = not content.strip()
        if not blank:
            held += (gap, content)
            size += len(gap) + len(content)
            gap = line[len(content) :]
        elif document == "file" and (held or begun):
            gap += line
        if document == "line" or (document == "blank-line" and blank):
            if held or begun:
                yield "".join(held), True
            held, size, begun, gap = [], 0, False, ""
        elif size + len(gap) >= PIECE:
            if len(gap) >= PIECE:
                held, gap = [*held, gap], ""
            yield "".join(held), False
            held, size, begun = [], 0, True
    if held or begun:
        yield "".join(held), True


@dataclass(frozen=True)
class TextFile:
    """One UTF-8 text file: plain, or compressed with gzip, bzip2 or xz, recognised by its first bytes."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes on disk, the unit of `documents`' progress."""
        return self.path.stat().st_size

    def check(self) -> None:
        """Refuse at once what cannot be a text file: looks at its beginning, compressed or not."""
        if not self.path.exists():
            raise InvalidData(
                f"text file {self.path} does not exist.\n  Give the path of a text file, plain or .gz, .bz2 or .xz."
            )
        if self.path.is_dir():
            raise InvalidData(f"text file {self.path} is a folder.\n  Give its files, for example {self.path}/*.txt.")
        if not self.path.is_file():
            raise InvalidData(
                f"text file {self.path} is not a regular file, and text is read more than once.\n"
                "  Write it to a file first (.gz, .bz2 and .xz are read as they are)."
            )
        if suffix := table(self.path):
            raise InvalidData(
                f"text file {self.path} is a {suffix} table, not plain text.\n"
                f"  Give it as --dataset {self.path} (and --text-column if its column is not 'text')."
            )
        if self.size == 0:
            raise InvalidData(f"text file {self.path} is empty (0 bytes).\n  Leave it out or give the full file.")
        try:
            with open(self.path, "rb") as raw:
                plain(raw, self.path)
        except DAMAGED as error:
            raise self._damaged(0, error) from error

    def documents(self, document: str, advance: Advance) -> Pieces:
        """The file's documents; `advance` receives how many more bytes of the file were read."""
        some = False
        for text, ends in pieces(self._lines(advance), document):
            some = True
            yield text, ends
        if not some:
            raise InvalidData(f"text file {self.path} holds only blank lines.\n  Leave it out or give the full file.")

    def _lines(self, advance: Advance) -> Iterator[str]:
        number, counted, foreign = 0, 0, False
        try:
            with open(self.path, "rb") as raw, TextIOWrapper(plain(raw, self.path), "utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if "\0" in line:
                        raise InvalidData(
                            f"text file {self.path} has a NUL character in line {number}: it is damaged or binary.\n"
                            "  Expected UTF-8 text, plain or compressed with gzip, bzip2 or xz."
                        )
                    foreign = foreign or not line.isascii()
                    yield line
                    if not number % 256:
                        advance(raw.tell() - counted)
                        counted = raw.tell()
                advance(raw.tell() - counted)
        except UnicodeDecodeError as error:
            raise InvalidData(f"text file {self.path} is not UTF-8: {_not_utf8(error, number, foreign)}") from error
        except DAMAGED as error:
            raise self._damaged(number, error) from error

    def _damaged(self, number: int, error: BaseException) -> InvalidData:
        return InvalidData(
            f"text file {self.path} cannot be read after line {number}: {error or type(error).__name__}.\n"
            "  Expected a readable file, and a complete one if it is compressed (.gz, .bz2, .xz)."
        )


def plain(raw: BinaryIO, path: Path, what: str | None = None) -> BinaryIO:
    """The file's text, decompressed if need be; refuses what is neither. what: it, for messages."""
    what = what or f"text file {path}"
    file, (kind, start) = raw, beginning(raw)
    named = _SUFFIXES.get(path.suffix.lower())
    if named and kind != named:
        raise InvalidData(
            f"{what} is named {path.suffix}, but is {phrase('binary' if kind == 'older' else kind, start)}\n"
            "  Give it its right name, or the complete file."
        )
    if kind in _OPENED:
        file = cast(BinaryIO, _OPENED[kind](raw))
        kind, start = beginning(file)
    if kind not in ("text", "utf-8-bom", "older"):
        inside = " (decompressed)" if file is not raw else ""
        raise InvalidData(
            f"{what}{inside} is {phrase(kind, start)}\n"
            "  Expected UTF-8 text, plain or compressed with gzip, bzip2 or xz."
        )
    return file


def beginning(file: BinaryIO) -> tuple[str, bytes]:
    """(`sniff`'s kind, first bytes); 'text' for all that reads as text but a pointer, 'older' for bytes of another
    encoding without a NUL. The file is at its beginning before and after."""
    start = file.read(START)
    file.seek(0)
    kind = kind_of(start, 1 << 62 if len(start) == START else len(start))
    if kind in ("empty", "git-lfs", "git-annex"):
        return kind, start
    if kind_of(b" " + start, 1 << 62) in ("text", "html"):  # whatever its first word is
        return "text", start
    return "older" if kind == "binary" and b"\0" not in start else kind, start


def _not_utf8(error: UnicodeDecodeError, number: int, foreign: bool) -> str:
    """What the file holds instead of UTF-8, and the remedy. number: whole lines before the text that cannot be decoded;
    foreign: whether some of them have UTF-8 beyond ASCII."""
    data, at = error.object, error.start
    where = f"byte 0x{data[at]:02x} in line {number + 1 + data[:at].count(10)}"
    if _PAIR.match(data, at):
        return (
            f"{where} begins a UTF-16 pair written half by half (CESU-8, as Java and databases write emoji).\n"
            f"  Join the halves: {_JOIN}"
        )
    if foreign or any(byte > 127 for byte in data[:at]):
        return (
            f"{where}, with UTF-8 before it: the file is damaged or mixes encodings.\n"
            "  Mend that line, or drop what is not UTF-8: iconv -c -f UTF-8 -t UTF-8."
        )
    first = max(data.rfind(byte, 0, at) for byte in b" \n\t") + 1
    last = min(end for byte in b" \n\t" if (end := data.find(byte, at)) >= 0 or (end := len(data)))
    word = data[max(first, at - 24) : min(last, at + 24)]
    read = []
    for encoding in _OLDER:
        try:
            if (text := word.decode(encoding)).isprintable():
                read.append(f"{encoding.upper()} {text!r}")
        except UnicodeDecodeError:
            continue
    if not read:
        return (
            f"{where}, which no older encoding that is known explains: the file is damaged.\n"
            "  Mend that line, or drop what is not UTF-8: iconv -c -f UTF-8 -t UTF-8."
        )
    return (
        f"{where}, which is of an older encoding ({'; '.join(read)}).\n"
        "  Convert it from the one in which that word reads right, for example: iconv -f WINDOWS-1252 -t UTF-8."
    )


def table(path: Path) -> str | None:
    """The suffix of a table, compressed or not; None for any other file."""
    ends = [suffix.lower() for suffix in path.suffixes]
    while ends and ends[-1] in (*_SUFFIXES, ".zst", ".lz4", ".zip"):
        ends.pop()
    return ends[-1] if ends and ends[-1] in TABLES else None
