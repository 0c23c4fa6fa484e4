"""What a file is, by its first bytes: for messages that name what lies in the place of a checkpoint or of text.

`sniff` gives the kind, `describe` the sentence for the user: what it is, how that comes about, what to do. Half a
kilobyte is read and nothing is run. Refuses nothing: a file that cannot be opened raises its OSError.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch.save began before 1.6
_LFS = re.compile(rb"version https?://(git-lfs|hawser)\S*/spec/v1\b")
_ANNEX = re.compile(rb"(\.\./)*(\.git)?/?annex/objects/")
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|\?xml[^>]*>\s*<error)\b", re.I | re.DOTALL)
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # its level, then a block or the end of no text
_GGUF = re.compile(rb"GGUF[\x01-\x09]\0\0\0")  # its version
START = 512  # bytes looked at
# Shown to the user, never run here: only it can say that the files are trusted.
_ANEW = "import sys, torch; [torch.save(torch.load(f, 'cpu', weights_only=False), f) for f in sys.argv[1:]]"

_WIDE = ("utf-32le", "utf-32be", "utf-16le", "utf-16be")  # without a byte-order mark
# kind, and how a file of it begins; the first that fits
_BEGINNINGS: tuple[tuple[str, bytes], ...] = (
    ("torch-legacy", _LEGACY_TORCH), ("zip", b"PK\x03\x04"), ("zip", b"PK\x05\x06"), ("gzip", b"\x1f\x8b"),
    ("xz", b"\xfd7zXZ\x00"), ("zstd", b"\x28\xb5\x2f\xfd"), ("lz4", b"\x04\x22\x4d\x18"),
    ("7z", b"7z\xbc\xaf\x27\x1c"), ("rar", b"Rar!\x1a\x07"), ("hdf5", b"\x89HDF\r\n\x1a\n"),
    ("numpy", b"\x93NUMPY"), ("parquet", b"PAR1"), ("arrow", b"ARROW1"), ("pdf", b"%PDF-"),
    ("utf-32", b"\xff\xfe\x00\x00"), ("utf-32", b"\x00\x00\xfe\xff"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff"),
    ("utf-8-bom", b"\xef\xbb\xbf"),
)  # fmt: skip

_PHRASES = {
    "empty": "empty, 0 bytes: a save that was killed, a power failure, or an unfinished copy. Copy it again, or use an "
    "older tag or file",
    "zeros": "nothing but zero bytes where it begins, as a power failure or a full disk leaves it. Copy it again, or "
    "use an older tag or file",
    "git-lfs": "a git-lfs pointer in place of the file itself{size}. Run `git lfs pull` in its repository, or download "
    "the file",
    "git-annex": "a git-annex pointer in place of the file itself. Run `git annex get` on it",
    "html": "a web page in place of the file: the download met a login, a limit or an error. Download it again",
    "torch-legacy": "in torch's format from before 1.6, which cannot be mapped into memory (DeepSpeed writes it where "
    "the ds_config says checkpoint_serialization: false). Save it again in today's, if you trust it, for this runs "
    f'what it holds: python -c "{_ANEW}" FILES',
    "pickle": "a bare Python pickle, which can run code when it is opened and was not opened",
    "zip": "a zip archive, as torch.save's files are. Unpack it if it holds something else",
    "safetensors": "a safetensors file",
    "gzip": "compressed with gzip. Decompress it (gunzip)",
    "bzip2": "compressed with bzip2. Decompress it (bunzip2)",
    "xz": "compressed with xz. Decompress it (unxz)",
    "zstd": "compressed with zstd. Decompress it (unzstd)",
    "lz4": "compressed with lz4. Decompress it (unlz4)",
    "7z": "a 7-Zip archive. Unpack it (7z x)",
    "rar": "a RAR archive. Unpack it (unrar x)",
    "tar": "a tar archive. Unpack it (tar xf)",
    "gguf": "a GGUF file of llama.cpp. Take the safetensors that it was made of",
    "hdf5": "an HDF5 file, as TensorFlow keeps weights. Convert it to safetensors (from_pretrained(..., from_tf=True) "
    "of transformers 4, then save_pretrained)",
    "numpy": "a NumPy array",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "pdf": "a PDF. Extract its text (pdftotext)",
    **{
        name: f"text in {name.upper()}. Convert it to UTF-8 (iconv -f {name.upper()} -t UTF-8)"
        for name in ("utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be")
    },
    "utf-8-bom": "text in UTF-8 with a byte-order mark, which its readers take for text. Write it again without (sed "
    "-i '1s/^\\xef\\xbb\\xbf//' FILE)",
    "text": "text, which begins {start!r}",
    "binary": "of a kind that is not known, which begins {start!r}",
}  # fmt: skip


class Sniffed(NamedTuple):
    """``kind``: a key of `_PHRASES`; ``size``: of the file, in bytes; ``start``: its first bytes."""

    kind: str
    size: int
    start: bytes


def sniff(path: Path) -> Sniffed:
    """What the file at ``path`` is. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        start = file.read(START)
        size = file.seek(0, 2)
    return Sniffed(kind_of(start, size), size, start)


def kind_of(start: bytes, size: int) -> str:
    """The kind of a file of ``size`` bytes whose first 512 (or all) are ``start``."""
    if not start:
        return "empty"
    if not start.strip(b"\0"):
        return "zeros"
    if _LFS.match(start):
        return "git-lfs"
    if _ANNEX.match(start):
        return "git-annex"
    if _PAGE.match(start.removeprefix(b"\xef\xbb\xbf")):
        return "html"
    for kind, pattern in (("bzip2", _BZIP2), ("gguf", _GGUF)):  # letters alone are text
        if pattern.match(start):
            return kind
    for kind, beginning in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start[257:262] == b"ustar":
        return "tar"
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", start):
        return "pickle"
    text = _decoded(start, "utf-8", size)
    if text is not None and 5 * text.count("\0") < len(text):
        return "binary" if "\0" in text else "text"
    return next((encoding for encoding in _WIDE if _reads(_decoded(start, encoding, size))), "binary")


def _decoded(start: bytes, encoding: str, size: int) -> str | None:
    """``start`` as text; None if it is none in that encoding. A character may be cut off at its end."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(start, final=size <= len(start))
    except UnicodeDecodeError:
        return None


def _reads(text: str | None) -> bool:
    """Whether it is text with a character below U+0100, whose bytes have a NUL, and none that text does not have."""
    if not text or min(text) > "\xff":
        return False
    return all(c in "\t\n\f\r" or unicodedata.category(c) not in ("Cc", "Cn", "Co", "Cs") for c in text)


def describe(path: Path) -> str:
    """What the file at ``path`` is and what to do: a sentence to follow "PATH: ". Raises OSError."""
    kind, _, start = sniff(path)
    return phrase(kind, start)


def phrase(kind: str, start: bytes) -> str:
    """The sentence of `describe` for a kind and the first bytes of its file."""
    size = re.search(rb"^size (\d{1,18})$", start, re.MULTILINE)
    size_text = f", which has {int(size[1]):,} bytes" if size else ""
    return _PHRASES[kind].replace("{size}", size_text).replace("{start!r}", repr(start[:32])) + "."


def instead(path: Path, *expected: str) -> str:
    """To follow the words that a file cannot be read: what it is in place of the ``expected`` kinds; '' if it is one of
    them, or cannot be opened, either."""
    with contextlib.suppress(OSError):
        kind, _, start = sniff(path)
        if kind not in expected:
            return f": it is {phrase(kind, start)}"
    return ""
