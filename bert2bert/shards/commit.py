"""How a checkpoint becomes visible: `NAME.partial`, synced and checked, manifest last, one rename, and only then
`latest`.

A process killed at any moment leaves nothing that looks complete, and running it again finishes the job: a partial
folder of a dead process is replaced, one of a live process is refused (a lock file tells them apart, so two machines
on a file system without locks are not protected from each other). The trainer's own saving uses the small functions.

Refuses a target that already holds a checkpoint, is no folder, has no parent or cannot be written (InvalidConfig), a
folder whose files are not those its manifest lists (InvalidCheckpoint), and a disk without room (UserError).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError

MANIFEST = "bert2bert.json"
FORMAT_VERSION = 1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make every name and every file's content below a folder durable."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    fsync_folder(path.parent)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but the manifest, by name relative to it, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    return {name: sizes[name] for name in sorted(sizes) if name != MANIFEST}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``folder/bert2bert.json`` atomically: the mark that everything else in the folder is there."""
    _replace(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def set_latest(root: Path, tag: str, name: str = "latest") -> None:
    """Point ``root/latest`` (or another pointer) at a tag, atomically. Call it after `check_complete`."""
    _replace(root / name, tag)


def check_complete(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that holds every file the manifest lists, at its size; else InvalidCheckpoint."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{folder} is not complete: it has no {MANIFEST}, which is written last.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path} is not a manifest of this project: {error!r}.") from None
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            raise InvalidCheckpoint(f"{folder} lacks {name} ({size} bytes), which its {MANIFEST} lists.")
        if (found := file.stat().st_size) != size:
            raise InvalidCheckpoint(
                f"{file} has {found} bytes; {MANIFEST} says {size}: it is truncated or was replaced."
            )
    return dict(manifest)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no room left on the disk of {path}: {error.strerror}. Free some and run again."
            ) from error
        if error.errno in (errno.EFBIG, errno.EIO, errno.ESTALE):
            raise UserError(
                f"{error.filename or path} cannot be written: {error.strerror}. Check the file system and the limit on "
                "file sizes (ulimit -f), or choose another target."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InvalidConfig(
                f"{error.filename or path} cannot be written: {error.strerror}. Choose another target."
            ) from error
        raise


def _abandoned(folder: Path) -> bool:
    """A whole growth that was renamed into place but never pointed at: its process died in between."""
    try:
        return check_complete(folder).get("kind") == "growth"
    except InvalidCheckpoint:
        return False


def _occupied(target: Path, final: Path) -> str | None:
    """What makes ``target`` a folder that already holds a checkpoint, if anything."""
    for pattern in ("latest", MANIFEST, "*.safetensors", "pytorch_model*.bin", "*_states.pt"):
        if found := sorted(target.glob(pattern)):
            return found[0].name
    for states in sorted(target.glob("*/*_states.pt")):
        folder = states.parent
        if folder.suffix != ".partial" and not (folder == final and _abandoned(folder)):
            return folder.name
    if final != target and final.exists() and not _abandoned(final):
        return final.name
    if final == target and target.exists() and any(target.iterdir()):
        return sorted(path.name for path in target.iterdir())[0]
    return None


class Pending:
    """A checkpoint folder under way, held by one process: make with `begin`, then `commit` or `abort`.

    ``partial``: where the files go; ``final``: what it is renamed to.
    """

    def __init__(self, target: Path, tag: str | None) -> None:
        self.target = target
        self.final = target if tag is None else target / tag
        self.partial = self.final.with_name(self.final.name + ".partial")
        self._lock_path = self.final.with_name(f".{self.final.name}.lock")
        self._lock: int | None = None
        self._made_target = False

    def _acquire(self) -> None:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 200).decode(errors="replace") or "another process"
                os.close(fd)
                raise InvalidConfig(
                    f"{holder} is writing {self.partial} now. Wait for it, or choose another target."
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._lock_path)):
                    os.ftruncate(fd, 0)
                    os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    self._lock = fd
                    return
            os.close(fd)  # its owner finished and removed it while we waited for the lock: look again

    def refuse(self) -> None:
        """Raise InvalidConfig if the target is not a place for a new checkpoint. Changes nothing."""
        parent = self.target.parent
        if not parent.is_dir():
            raise InvalidConfig(f"{parent}, the parent of the target {self.target.name}, is no folder. Make it first.")
        if self.target.exists() and not self.target.is_dir():
            raise InvalidConfig(f"the target {self.target} is not a folder. Name a new folder.")
        if found := _occupied(self.target, self.final):
            raise InvalidConfig(
                f"{self.target} already holds a checkpoint or other files ({found}). Name a new folder."
            )

    def begin(self, need: int) -> None:
        """Lock, refuse what must not be overwritten, make an empty partial folder with room for ``need`` bytes."""
        self.refuse()
        with disk_errors(self.target):
            if self.final != self.target and not self.target.exists():
                self.target.mkdir()
                self._made_target = True
            self._acquire()
            try:
                self.refuse()  # somebody may have finished while we took the lock
                if self.partial.exists():
                    shutil.rmtree(self.partial)
                free = shutil.disk_usage(self.partial.parent).free
                if free < need:
                    raise UserError(
                        f"{self.target} needs {need / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. "
                        "Free some, or choose a target on another disk."
                    )
                self.partial.mkdir()
            except BaseException:
                self.abort()
                raise

    def commit(self, manifest: dict[str, Any], pointers: tuple[str, ...]) -> Path:
        """Make the written folder the checkpoint: sync, manifest, rename, then the pointers in order. Returns it."""
        with disk_errors(self.target):
            for folder, _, _ in os.walk(self.partial):
                fsync_folder(Path(folder))
            write_manifest(self.partial, manifest)
            check_complete(self.partial)
            self.refuse()
            if self.final != self.target and self.final.exists():
                shutil.rmtree(self.final)  # an abandoned growth, else refused above
            os.rename(self.partial, self.final)
            fsync_folder(self.final.parent)
            for name in pointers:
                set_latest(self.target, self.final.name, name)
        self._release()
        return self.final

    def abort(self) -> None:
        """Leave nothing behind: no partial folder, no lock, no empty target folder that was made here."""
        if self._lock is not None:  # else the partial folder is another's
            shutil.rmtree(self.partial, ignore_errors=True)
            self._release()
        if self._made_target:
            with contextlib.suppress(OSError):
                self.target.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
