"""Whether a torch file is the archive that torch.save wrote, before torch believes every word of it.

torch reads records by name, from where their own headers say that they begin, and checks no checksum: a damaged byte in
a header shifts a tensor, one in the structure renames it, in silence. Here names are compared with the directory,
records must follow each other without gaps, and the checksums of all but the tensors are computed. Tensors' bytes are
not read.

Refuses, as InvalidCheckpoint, an archive of which any of this is not so.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

from bert2bert.errors import InvalidCheckpoint

_TENSOR = re.compile(r"[^/]+/data/\d+")
_HEAD = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTORS = (0, 12, 16, 20, 24)  # bytes between records: sizes and checksum, repeated, in any form that zip has
_BAD = (zipfile.BadZipFile, ValueError, EOFError, struct.error, RuntimeError, OSError)  # what zipfile may raise
_MOST = 1 << 30  # bytes of a structure


class Checked(NamedTuple):
    """``structure``: bytes of data.pkl; ``content``: equal where two files hold the same, "" where checksums that would
    tell were left out."""

    structure: int
    content: str


def check(path: Path) -> Checked:
    """What an archive is, after all checks. Raises InvalidCheckpoint."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            found = _check(file.fileno(), archive)
    except _BAD as error:
        raise InvalidCheckpoint(
            f"{path}: not readable as a torch file ({error}). Copy it again from where it was written."
        ) from None
    return found


def _check(fd: int, archive: zipfile.ZipFile) -> Checked:
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("two of its records have one name")
    ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
    structure, content, checksums = None, hashlib.blake2b(digest_size=16), True
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its record {info.filename!r} is compressed, which torch does not do")
        head = os.pread(fd, _HEAD.size, info.header_offset)
        magic, *_, name, extra = _HEAD.unpack(head)
        told = os.pread(fd, name, info.header_offset + _HEAD.size)
        wanted = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if magic != b"PK\x03\x04" or told != wanted:
            raise ValueError(f"its record {info.filename!r} is headed {told[:80]!r}")
        if end - (info.header_offset + _HEAD.size + name + extra + info.file_size) not in _DESCRIPTORS:
            raise ValueError(f"its record {info.filename!r} does not end where the next one begins")
        _, _, kind = info.filename.partition("/")
        if kind != ".data/serialization_id":  # a digest of the others
            content.update(f"{kind} {info.file_size} {info.CRC}\n".encode())
            checksums = checksums and (info.CRC != 0 or info.file_size == 0)
        if _TENSOR.fullmatch(info.filename):
            continue
        if info.file_size > _MOST:
            raise ValueError(f"its record {info.filename!r} has {info.file_size:,} bytes, which is no structure")
        if info.CRC:  # 0: torch was told to leave it out
            content.update(archive.read(info))
        if info.filename.endswith("/data.pkl"):
            structure = info.file_size
    if structure is None:
        raise ValueError("it has no record data.pkl, so torch.save did not write it")
    return Checked(structure, content.hexdigest() if checksums else "")
