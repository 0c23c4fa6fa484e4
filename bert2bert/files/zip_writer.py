"""A zip of stored (uncompressed) records, written in one pass: the archive that torch.save writes and torch.load maps.

zipfile would do, except for its checksum (zlib's, three to six times slower here) and its cost for small files, of
which a universal checkpoint has thousands. Records are dated 1980, so equal input gives equal bytes, and begin at
multiples of 64 bytes; their sizes and checksums follow them, and are repeated in the directory at the end (APPNOTE.TXT
6.3, sections 4.3.7 to 4.3.16). Refuses a record that is not as long as announced (RuntimeError).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol

from zlib_ng import zlib_ng

ALIGNMENT = 64
_ZIP64 = (1 << 31) - 1  # above it records carry 64-bit sizes
SMALL = 1 << 16  # bytes; smaller records are gathered, so that a small file is written at once
_LOCAL, _CENTRAL = struct.Struct("<4sHHHHHIIIHH"), struct.Struct("<4sHHHHHHIIIHHHHHII")
_END, _END64 = struct.Struct("<4sHHHHIIH"), struct.Struct("<4sQHHIIQQQQ")
_LOCATOR, _PAD = struct.Struct("<4sIQI"), struct.Struct("<2sH")
_FOLLOWS_NARROW, _FOLLOWS_WIDE = struct.Struct("<4sIII"), struct.Struct("<4sIQQ")
_WIDE = struct.pack("<HHQQ", 1, 16, 0, 0)  # extra field of a record whose sizes follow in 64 bits
_FOLLOWS = 1 << 3  # flag: sizes and checksum come after the data
_DATE = 1 << 5 | 1  # 1980-01-01
_UNIX, _OPEN = 3 << 8, 0o600 << 16  # permissions of what is unpacked
_NEVER = 0xFFFFFFFF  # in place of a number that is in the extra field


class File(Protocol):
    """What an archive is written to."""

    def write(self, data: bytes | memoryview) -> int: ...

    def tell(self) -> int: ...


class Zipped:
    """An archive under way, from where ``file`` is. Names must be ASCII."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._at = file.tell()
        self._central: list[bytes] = []
        self._small = bytearray()  # what is not written yet

    def record(self, name: str, size: int, blocks: Iterable[bytes | memoryview]) -> None:
        """Append a record of ``size`` bytes."""
        text, at = name.encode("ascii"), self._at
        wide = size * 1.05 > _ZIP64
        version = 45 if wide else 20
        sizes = _WIDE if wide else b""
        gap = -(at + 34 + len(text) + len(sizes)) % ALIGNMENT
        pad = _PAD.pack(b"FB", gap) + b"Z" * gap  # as torch pads
        hidden = _NEVER if wide else 0
        head = (version, _FOLLOWS, 0, 0, _DATE, 0, hidden, hidden, len(text), len(pad) + len(sizes))
        self._small += _LOCAL.pack(b"PK\3\4", *head) + text + pad + sizes
        if size >= SMALL:
            self._flush()
        checksum, before = 0, self._file.tell() + len(self._small)
        for block in blocks:
            checksum = zlib_ng.crc32(block, checksum)
            if size < SMALL:
                self._small += block
            else:
                self._file.write(block)
        if (found := self._file.tell() + len(self._small) - before) != size:
            raise RuntimeError(f"record {name} was announced with {size} bytes and has {found}")
        follows = (_FOLLOWS_WIDE if wide else _FOLLOWS_NARROW).pack(b"PK\7\x08", checksum, size, size)
        self._small += follows
        self._at = at + _LOCAL.size + len(text) + len(pad) + len(sizes) + size + len(follows)
        large = [*([size, size] if size > _ZIP64 else []), *([at] if at > _ZIP64 else [])]
        extra = (struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b"") + pad
        stored, place = _NEVER if size > _ZIP64 else size, _NEVER if at > _ZIP64 else at
        version = 45 if large else version
        entry = (version | _UNIX, version, _FOLLOWS, 0, 0, _DATE, checksum, stored, stored, len(text), len(extra))
        self._central.append(_CENTRAL.pack(b"PK\1\2", *entry, 0, 0, 0, _OPEN, place) + text + extra)

    def close(self) -> None:
        """Append the directory."""
        at, count, directory = self._at, len(self._central), b"".join(self._central)
        self._small += directory
        if count > 0xFFFF or max(at, len(directory)) > _ZIP64:
            self._small += _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at)
            self._small += _LOCATOR.pack(b"PK\6\7", 0, at + len(directory), 1)
        count = min(count, 0xFFFF)
        self._small += _END.pack(b"PK\5\6", 0, 0, count, count, min(len(directory), _NEVER), min(at, _NEVER), 0)
        self._flush()

    def _flush(self) -> None:
        if self._small:
            self._file.write(bytes(self._small))
            self._small.clear()
