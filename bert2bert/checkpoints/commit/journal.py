"""What a growth under way has finished, so that the same command, run again after a kill, need not do it again.

A *job* records what decides every byte that will be written: the plan, the source, the target's settings, how it is cut
into files, the program's version. Each rank appends a line for every file that it has written and synced to a journal
of its own: size, content digest, and the digests of the tensor parts in the file. Nothing of it is taken on trust: a
file counts as finished if the job is the same and the file's content still has the digest.

Refuses nothing: a line that is torn or foreign is as good as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bert2bert import __version__
from bert2bert.files.digest import TENSOR_DIGEST, file_digest, hex16
from bert2bert.files.disk import disk_errors, fsync_file

Tensors = dict[tuple[str, str], int]
"""(name, state) -> digest of the part of it that a file holds."""
_AHEAD = 256  # files written and not yet looked at, at most
_SYNCS = 8  # at a time: a file system commits what is asked of it together,
_BATCH, _PAUSE = 64, 0.1  # so files wait for company: this many, or seconds


@dataclass(frozen=True)
class Entry:
    """A finished file: bytes, content digest (see `file_digest`), digests of the tensor parts in it."""

    size: int
    digest: str
    tensors: Tensors

    def line(self, name: str) -> bytes:
        """As the journal holds it."""
        tensors = [[*key, hex16(value)] for key, value in self.tensors.items()]
        entry = {"file": name, "size": self.size, "digest": self.digest, "tensors": tensors}
        return (json.dumps(entry) + "\n").encode()


def job(growth: Mapping[str, Any] | None, stamps: Any, settings: Any, layout: Any) -> dict[str, str] | None:
    """What decides every byte of the output, each aspect as a digest under the name that a message calls it by.

    growth: the manifest's ``growth``, which names plan and source; without both (None), no run is the same as another.
    stamps: of the source's files, see `Watch`. settings: the target's. layout: how it is cut into files.
    """
    growth = growth or {}
    if not growth.get("plan_digest") or not growth.get("source"):
        return None
    source = {key: value for key, value in growth["source"].items() if key != "path"}
    options = {key: value for key, value in growth.items() if key not in ("source", "drift")}
    return {
        "plan": _hash(growth["plan_digest"]),
        "source": _hash([source, stamps]),
        "options": _hash(options),
        "target settings": _hash(settings),
        "layout of files": _hash(layout),
        "version of the program": _hash([__version__, str(torch.__version__), TENSOR_DIGEST]),
    }


def _hash(tree: Any) -> str:
    total = hashlib.sha256()
    _feed(tree, total)
    return total.hexdigest()


def _feed(tree: Any, total: Any, seen: dict[int, Any] | None = None) -> None:
    """Enter a value of any kind that checkpoints hold into a hash, type and structure included."""
    seen = {} if seen is None else seen
    total.update(f"<{type(tree).__name__}".encode())
    known = seen.get(id(tree))
    if known is not None and known[1] is tree:  # once is enough; it may contain itself
        total.update(str(known[0]).encode())
    elif isinstance(tree, torch.Tensor):
        total.update(f"{tuple(tree.shape)}{tree.dtype}".encode())
        total.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(tree, torch.UntypedStorage):
        total.update(torch.empty(0, dtype=torch.uint8).set_(tree).numpy().data)
    elif isinstance(tree, bytes | bytearray):
        total.update(len(tree).to_bytes(8, "little") + tree)
    elif isinstance(tree, set | frozenset):  # whose order is of no run but this
        total.update("".join(sorted(map(repr, tree))).encode())
    elif isinstance(tree, Mapping | list | tuple) or (hasattr(tree, "__dict__") and not isinstance(tree, type)):
        seen[id(tree)] = len(seen), tree
        table = {} if isinstance(tree, list | tuple) else tree if isinstance(tree, Mapping) else vars(tree)
        for part in tree if isinstance(tree, list | tuple) else (item for pair in table.items() for item in pair):
            _feed(part, total, seen)
    else:
        total.update(repr(tree).encode())
    total.update(b">")


def read(folder: Path) -> dict[str, list[Entry]]:
    """The entries of all ranks' journals in a folder, by file."""
    found: dict[str, list[Entry]] = {}
    for journal in sorted(folder.glob("finished.*.jsonl")):
        for line in journal.read_bytes().splitlines():
            try:
                record = json.loads(line)
                tensors = {(str(name), str(state)): int(value, 16) for name, state, value in record["tensors"]}
                entry = Entry(int(record["size"]), str(record["digest"]), tensors)
                found.setdefault(str(record["file"]), []).append(entry)
            except (ValueError, KeyError, TypeError):
                continue  # its writer was killed
    return found


def verified(path: Path, entries: Iterable[Entry]) -> Entry | None:
    """The entry that a file's content agrees with, if any; reads the file if one has its size."""
    if path.is_symlink() or not path.is_file():
        return None
    size = path.stat().st_size
    candidates = [entry for entry in entries if entry.size == size]
    content = file_digest(path) if candidates else None
    return next((entry for entry in candidates if entry.digest == content), None)


class Finisher:
    """Syncs and journals the files that a rank has written, in a thread, while it writes the next ones.

    ``root``: the folder that names are relative to; ``journal``: the rank's own file. Small files share a sync of it.
    """

    def __init__(self, root: Path, journal: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self._root, self._journal = root, journal
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[str, Entry] | None] = queue.Queue(_AHEAD)
        self._pool = ThreadPoolExecutor(_SYNCS, "sync")
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)
        self._thread.start()

    def add(self, name: str, entry: Entry) -> None:
        """Hand over a file that is written and closed. Raises what went wrong with an earlier one."""
        if self._error is None:
            self._queue.put((name, entry))
        else:
            raise self._error

    def close(self) -> dict[str, Entry]:
        """Wait until all are finished; their entries. Raises what went wrong."""
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()
        if self._error is not None:
            raise self._error
        return self.entries

    def _run(self) -> None:
        last, synced = False, dict[str, Entry]()
        while not last:
            batch = [self._queue.get()]
            until = time.monotonic() + _PAUSE
            with contextlib.suppress(queue.Empty):
                while batch[-1] is not None and len(batch) < _BATCH:
                    batch.append(self._queue.get(timeout=max(0, until - time.monotonic())))
            last = batch[-1] is None
            entries = dict(item for item in batch if item is not None)
            try:
                if self._error is None:  # else only make room, so that nobody waits
                    list(self._pool.map(self._sync, (list(entries)[i::_SYNCS] for i in range(_SYNCS))))
                    synced |= entries
                if synced and (self._error is None or last):  # by then even a full disk has room: see `Sink`
                    self._note(synced)
                    synced = {}
            except Exception as error:
                self._error = self._error or error

    def _sync(self, names: list[str]) -> None:
        for path in (self._root / name for name in names):
            with disk_errors(path):
                fsync_file(path)

    def _note(self, entries: dict[str, Entry]) -> None:
        with disk_errors(self._journal), open(self._journal, "ab") as file:
            file.write(b"\n" + b"".join(entry.line(name) for name, entry in entries.items()))  # after a torn line
            file.flush()
            os.fsync(file.fileno())
        self.entries |= entries
