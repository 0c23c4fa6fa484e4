"""How a checkpoint becomes visible: written below `NAME.partial`, synced and checked, manifest last, one rename, and
only then `latest`.

    NAME.partial/lock                 held by every rank that writes
                 job.json             what decides every byte of the output
                 finished.RANK.jsonl  see `journal`
                 files.partial/       becomes NAME

A process killed at any moment leaves nothing that looks complete, and running it again finishes the job with what was
finished before, if the job is the same; else that is thrown away. A folder that a living process writes is refused (a
lock tells, so two machines on a file system without locks are not protected from each other). The trainer's own saving
uses the small functions.

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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.shards.disk import disk_errors, fsync_folder, inside, replace

MANIFEST = "bert2bert.json"
FORMAT_VERSION = 1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
_LOCK, _JOB, _FILES, _REPLACED = "lock", "job.json", "files.partial", "replaced.partial"


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but the manifest, by name relative to it, sorted."""
    sizes = dict(_sizes(str(folder), ""))
    return {name: sizes[name] for name in sorted(sizes) if name != MANIFEST}


def _sizes(folder: str, above: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(entry.path, f"{above}{entry.name}/")
            elif os.path.isfile(entry.path):  # entry.is_file() raises for a loop of links
                yield above + entry.name, entry.stat().st_size


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``folder/bert2bert.json`` atomically: the mark that everything else in the folder is there."""
    replace(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def set_latest(root: Path, tag: str, name: str = "latest", scratch: Path | None = None) -> None:
    """Point ``root/latest`` (or another pointer) at a tag, atomically. Call it after `check_complete`. scratch: as of
    `disk.replace`."""
    replace(root / name, tag, scratch)


def listed(folder: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """The files that a manifest lists and their sizes, no name leading out of the folder. Raises InvalidCheckpoint."""
    try:
        files = {str(name): int(size) for name, size in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidCheckpoint(f"{folder / MANIFEST} is not a manifest of this project: {error!r}.") from None
    for name in files:
        inside(folder, name)
    return files


def check_complete(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that holds every file the manifest lists, at its size; else InvalidCheckpoint."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{folder} is not complete: it has no {MANIFEST}, which is written last.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not a manifest of this project: {error!r}.") from None
    for name, size in listed(folder, manifest).items():
        file = folder / name
        if not file.is_file():
            raise InvalidCheckpoint(f"{folder} lacks {name} ({size} bytes), which its {MANIFEST} lists.")
        if (found := file.stat().st_size) != size:
            raise InvalidCheckpoint(
                f"{file} has {found} bytes; {MANIFEST} says {size}: it is truncated or was replaced."
            )
    return dict(manifest)


def _whole(folder: Path) -> bool:
    """A growth, or a checkpoint written anew, with all its files. If nothing points at it, its process died after the
    rename."""
    try:
        manifest = check_complete(folder)
        return manifest.get("kind") == "growth" or "reshard" in manifest
    except InvalidCheckpoint:
        return False


def _occupied(target: Path, final: Path) -> str | None:
    """What makes ``target`` a folder that already holds a checkpoint, if anything."""
    for pattern in ("latest", MANIFEST, "*.safetensors", "pytorch_model*.bin", "*_states.pt"):
        if found := sorted(target.glob(pattern)):
            return found[0].name
    for states in sorted(target.glob("*/*_states.pt")):
        folder = states.parent
        if folder.suffix != ".partial" and not (folder == final and _whole(folder)):
            return folder.name
    if final != target and final.exists() and not _whole(final):
        return final.name
    if final == target and target.exists() and any(target.iterdir()):
        return sorted(path.name for path in target.iterdir())[0]
    return None


class Pending:
    """A checkpoint folder under way: rank 0 calls `begin`, the others `join`, then rank 0 `commit` or `abort`, and all
    `close`.

    ``files``: where the files go; ``final``: what that is renamed to; ``partial``: the folder around it until then.
    """

    def __init__(self, target: Path, tag: str | None) -> None:
        self.target = target
        self.final = target if tag is None else target / tag
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.files = self.partial / _FILES
        self._lock: int | None = None
        self._made_target = False
        self._resumable = False

    # --- the lock ----------------------------------------------------------------------------------------------

    def _acquire(self, alone: bool) -> None:
        """Take the lock for this rank. alone: only if nobody holds it, not even a rank whose rank 0 was killed."""
        lock = self.partial / _LOCK
        while True:
            self.partial.mkdir(exist_ok=True)
            try:
                fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its owner finished and removed the folder
                continue
            try:
                if alone:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which a second begin cannot get past
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
                if os.path.samestat(os.fstat(fd), os.stat(lock)):
                    self._lock = fd
                    break
            os.close(fd)  # its owner removed it while we waited: look again
        if alone:
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def join(self) -> None:
        """Hold the lock on a rank other than 0, so that nobody takes over while any rank of a broken run writes on."""
        with disk_errors(self.target):
            self._acquire(alone=False)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- before writing ----------------------------------------------------------------------------------------

    def _left_over(self) -> bool:
        """The work is done, but for the last steps of its process, which died."""
        return (self.partial / _JOB).is_file() and not self.files.exists() and _whole(self.final)

    def refuse(self) -> None:
        """Raise InvalidConfig if the target is not a place for a new checkpoint. Changes nothing."""
        parent = self.target.parent
        if not parent.is_dir():
            raise InvalidConfig(f"{parent}, the parent of the target {self.target.name}, is no folder. Make it first.")
        if self.target.exists() and not self.target.is_dir():
            raise InvalidConfig(f"the target {self.target} is not a folder. Name a new folder.")
        if not self._left_over():
            self._refuse_occupied()

    def _refuse_occupied(self) -> None:
        if found := _occupied(self.target, self.final):
            raise InvalidConfig(
                f"{self.target} already holds a checkpoint or other files ({found}). Name a new folder."
            )

    def begin(self, job: dict[str, str] | None, need: int, say: Callable[[str], None]) -> bool:
        """Lock, refuse what must not be overwritten, and make the folder for the files, with room for ``need`` bytes
        and without anything of another job. True: the same job had committed before it was killed; nothing is left.
        """
        self.refuse()
        with disk_errors(self.target):
            if self.final != self.target and not self.target.exists():
                self.target.mkdir()
                self._made_target = True
            self._acquire(alone=True)
            before = self._job()
            same, self._resumable = job is not None and before == job, job is not None
            if same and self._left_over():
                if self.final == self.target or (self.target / "latest").exists():
                    self._clear()
                    say(f"finished {self.final}: a killed run of this command had committed it")
                    return True
                os.rename(self.final, self.files)  # nothing names it yet: look at it file by file as at any other
            self._refuse_occupied()  # somebody may have finished while we took the lock
            old = [path for path in self.partial.iterdir() if path.name != _LOCK]
            if old and not same:
                changed = [key for key in job if (before or {}).get(key) != job[key]] if job and before else []
                if before or (self.files.is_dir() and file_sizes(self.files)):  # else killed before it wrote anything
                    say(
                        f"discarded {self.partial}: "
                        + (f"made with another {', '.join(changed)}" if changed else "of another run")
                    )
                for path in old:
                    _remove(path)
            self.files.mkdir(exist_ok=True)
            replace(self.partial / _JOB, json.dumps(job))
            have = sum(file_sizes(self.files).values())
            free = shutil.disk_usage(self.partial).free
            if free + have < need:
                raise UserError(
                    f"{self.target} needs {(need - have) / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. "
                    "Free some, or choose a target on another disk."
                )
        return False

    def _job(self) -> dict[str, str] | None:
        try:
            found = json.loads((self.partial / _JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every file under way but these: half-written ones, foreign ones, links."""
        for parent, _, files in os.walk(self.files):
            for file in files:
                path = Path(parent, file)
                if path.relative_to(self.files).as_posix() not in names:
                    path.unlink()

    # --- after writing -----------------------------------------------------------------------------------------

    def commit(self, manifest: dict[str, Any], pointers: tuple[str, ...]) -> Path:
        """Make the written folder the checkpoint: sync, manifest, rename, then the pointers in order. Returns it."""
        with disk_errors(self.target):
            for folder, _, _ in os.walk(self.files):
                fsync_folder(Path(folder))
            write_manifest(self.files, manifest)
            check_complete(self.files)
            self._refuse_occupied()
            if self.final != self.target and self.final.exists():
                os.rename(self.final, self.partial / _REPLACED)  # an abandoned growth, else refused above
            os.rename(self.files, self.final)
            fsync_folder(self.final.parent)
            for name in pointers:
                set_latest(self.target, self.final.name, name, scratch=self.partial)
            self._clear()
        return self.final

    def abort(self, say: Callable[[str], None]) -> None:
        """After an error: leave what is finished to the next run of the same command; if that is nothing, leave nothing
        behind: no partial folder, no empty target folder that was made here."""
        if self._lock is None:  # the partial folder is another's
            pass
        elif self._resumable and any(path.stat().st_size for path in self.partial.glob("finished.*.jsonl")):
            say(f"kept     {self.partial}: the same command goes on from there; delete it to give up")
        else:
            self._clear()
        if self._made_target:
            with contextlib.suppress(OSError):
                self.target.rmdir()

    def _clear(self) -> None:
        """Remove what is left of the partial folder; the job last, for it tells what the rest is."""
        with contextlib.suppress(OSError):  # nothing that matters is in it any more
            for path in sorted(self.partial.iterdir(), key=lambda path: (path.name == _JOB, path.name == _LOCK)):
                _remove(path)
            self.partial.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
