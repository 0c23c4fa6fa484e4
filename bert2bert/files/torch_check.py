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
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from bert2bert.errors import InvalidCheckpoint

_TENSOR = re.compile(r"[^/]+/data/(\d+)")
_HEAD = struct.Struct("<4sHHHHHIIIHH")
_DESCRIPTORS = (0, 12, 16, 20, 24)  # bytes between records: sizes and checksum, repeated, in any form that zip has
_BAD = (zipfile.BadZipFile, ValueError, EOFError, struct.error, RuntimeError, OSError)  # what zipfile may raise
_MOST = 1 << 30  # bytes of a structure


class Checked(NamedTuple):
    """``structure``: data.pkl; ``tensors``: number of a tensor's record -> where its bytes begin and end; ``content``:
    equal where two files hold the same, "" where checksums that would tell were left out."""

    structure: bytes
    tensors: dict[str, tuple[int, int]]
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
    structure, tensors = None, {}
    content, checksums = hashlib.blake2b(digest_size=16), True
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its record {info.filename!r} is compressed, which torch does not do")
        head = os.pread(fd, _HEAD.size, info.header_offset)
        magic, *_, name, extra = _HEAD.unpack(head)
        named = os.pread(fd, name, info.header_offset + _HEAD.size)
        wanted = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if magic != b"PK\x03\x04" or named != wanted:
            raise ValueError(f"its record {info.filename!r} is headed {named[:80]!r}")
        start = info.header_offset + _HEAD.size + name + extra
        if end - (start + info.file_size) not in _DESCRIPTORS:
            raise ValueError(f"its record {info.filename!r} does not end where the next one begins")
        _, _, kind = info.filename.partition("/")
        if kind != ".data/serialization_id":  # a digest of the others
            content.update(f"{kind} {info.file_size} {info.CRC}\n".encode())
            checksums = checksums and (info.CRC != 0 or info.file_size == 0)
        if found := _TENSOR.fullmatch(info.filename):
            tensors[found[1]] = start, start + info.file_size
            continue
        if info.file_size > _MOST:
            raise ValueError(f"its record {info.filename!r} has {info.file_size:,} bytes, which is not a structure")
        record = os.pread(fd, info.file_size, start) if not info.CRC else archive.read(info)  # 0: it was left out
        if info.CRC:
            content.update(record)
        if kind == "data.pkl":
            structure = record
        if kind == "byteorder" and record != sys.byteorder.encode():
            raise ValueError(f"its numbers are {record[:20]!r}-endian, those of this machine {sys.byteorder}")
    if structure is None:
        raise ValueError("it has no record data.pkl, so torch.save did not write it")
    return Checked(structure, tensors, content.hexdigest() if checksums else "")
