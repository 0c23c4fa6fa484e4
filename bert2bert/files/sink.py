"""A file that is written once, from its start to its end, and the digest of what is written.

Large parts go from a buffer to the disk, past the page cache (O_DIRECT), while the next are computed: nobody here reads
the file again, and finding, filling and writing back pages for it took a third of a growth's processor time, and far
more on a virtual machine whose host lends memory slowly. Where a file system does not take that, and for small files
and the last bytes of large ones, the same bytes go through the cache. Not synced here.

Refuses nothing; OSError (a full disk) passes through.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

_BUFFER = 1 << 22  # bytes; one disk is as fast with 1 MiB, file systems over a network like more
_ALIGNMENT = 1 << 12  # of addresses, offsets and lengths: enough for any disk's sectors
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_FEW = 1 << 16  # bytes that are not worth a way of their own
_spare: list[NDArray[np.uint8]] = []  # buffers of finished files, whose pages are at hand


def _buffer() -> NDArray[np.uint8]:
    """A buffer that begins at a page and is not shared with forked ranks."""
    try:
        return _spare.pop()
    except IndexError:
        return np.frombuffer(mmap.mmap(-1, _BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


class Sink:
    """``path`` is made, or emptied; ``disk`` runs what waits for the disk (None: the caller waits). ``size``: bytes so
    far. Use it in a ``with`` statement, at whose end the rest is written; a file that ends with an error is removed,
    which on a full disk leaves room to note what is finished."""

    def __init__(self, path: Path, disk: Executor | None = None) -> None:
        self.size = 0
        self._path, self._disk, self._total = path, disk, xxhash.xxh3_128()
        self._buffer, self._filled, self._past_cache = _buffer(), 0, False
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._under_way: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they must not change until the next call."""
        self._wait()
        if self._disk is None or len(data) < _FEW:
            self._append(data)
        else:
            self._under_way = self._disk.submit(self._append, data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.size

    def digest(self) -> str:
        """Of all bytes so far, as `digest.file_digest` gives it."""
        self._wait()
        return str(self._total.hexdigest())

    def _append(self, data: bytes | memoryview) -> None:
        self._total.update(data)
        given, start = np.frombuffer(data, np.uint8), 0
        while start < len(given):
            stop = min(len(given), start + _BUFFER - self._filled)
            filled = self._filled + stop - start
            self._buffer[self._filled : filled] = given[start:stop]  # NumPy lets other threads run meanwhile
            self._filled, start = filled, stop
            if filled == _BUFFER:
                self._put(self._buffer)
                self._filled = 0

    def _wait(self) -> None:
        if self._under_way is not None:
            done, self._under_way = self._under_way, None
            done.result()

    def _put(self, data: NDArray[np.uint8]) -> None:
        """Write bytes where the last ended."""
        whole = len(data) - len(data) % _ALIGNMENT if len(data) >= _FEW else 0
        for part, past_cache in ((data[:whole], True), (data[whole:], False)):
            while len(part):
                self._turn(past_cache and not len(part) % _ALIGNMENT)
                try:
                    part = part[os.write(self._fd, part.data) :]
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._past_cache:
                        raise
                    past_cache = False  # a file system that promised it and does not keep it

    def _turn(self, past_cache: bool) -> None:
        if past_cache == self._past_cache or not _DIRECT:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # this file system goes through the cache
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _DIRECT if past_cache else flags & ~_DIRECT)
            self._past_cache = past_cache

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        whole = False
        try:
            self._wait()
            if kind is None:
                self._put(self._buffer[: self._filled])
                whole = True
        finally:
            _spare.append(self._buffer)
            try:
                os.close(self._fd)  # where a quota may show
            except OSError:
                whole = False
                raise
            finally:
                if not whole:
                    with contextlib.suppress(OSError):
                        self._path.unlink()
