"""How a checkpoint becomes visible: written below `NAME.partial`, synced and checked, manifest last, one rename, and
only then `latest`.

    NAME.partial/lock                 held by every rank that writes, see `lock`
                 job.json             what decides every byte of the output
                 finished.RANK.jsonl  see `journal`
                 files.partial/       becomes NAME

A process killed at any moment leaves nothing that looks complete, and running it again finishes the job with what was
finished before, if the job is the same; else that is thrown away. A folder that a living process writes is refused.
Nothing is written or deleted through a link: a target may be a link to a folder, but what lies below it may not. The
trainer's own saving uses the small functions.

Refuses a target that already holds a checkpoint, is not a folder, lies below a file or cannot be written
(InvalidConfig), a folder whose files are not those its manifest lists (InvalidCheckpoint), and a disk without room
(UserError).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from bert2bert.checkpoints.manifest import MANIFEST, Manifest, check_sizes, read_manifest, write_manifest
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.files.digest import FILE_DIGEST, file_digest
from bert2bert.files.disk import disk_errors, fsync_folder, replace
from bert2bert.files.lock import Lock

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


def set_latest(root: Path, tag: str, name: str = "latest", scratch: Path | None = None) -> None:
    """Point ``root/latest`` (or another pointer) at a tag, atomically. Call it after `check_complete`. scratch: as of
    `disk.replace`."""
    replace(root / name, tag, scratch)


def check_complete(folder: Path) -> Manifest:
    """The manifest of a folder that holds every file the manifest lists, at its size; else InvalidCheckpoint."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InvalidCheckpoint(f"{folder} is not complete: it has no {MANIFEST}, which is written last.")
    check_sizes(folder, manifest)
    return manifest


def check_contents(folder: Path, names: Iterable[str]) -> None:
    """Read files of a checkpoint and compare them with the digests in its manifest, where it has them; the manifest
    itself with its own. Raises InvalidCheckpoint for the first that differs or cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    digests = manifest.digests
    recorded = digests.files if digests is not None and digests.kind == FILE_DIGEST else {}
    for name in names:
        try:
            if name == MANIFEST:
                whole = manifest.intact
            else:
                whole = name not in recorded or file_digest(folder / name) == recorded[name]
        except OSError as error:
            raise InvalidCheckpoint(f"{folder / name}: cannot be read: {error.strerror}. Use another tag.") from error
        if not whole:
            raise InvalidCheckpoint(
                f"{folder / name}: its content does not have the digest that was recorded when it was written: it is "
                "damaged or was changed. Use another tag, or restore the file."
            )


def _whole(folder: Path) -> bool:
    """Whether it is a growth, or the output of `reshard`, with all its files. If nothing points at it, its process
    died after the rename."""
    try:
        manifest = check_complete(folder)
        return manifest.kind == "growth" or manifest.reshard is not None
    except InvalidCheckpoint:
        return False


def _occupied(target: Path, final: Path) -> str | None:
    """What makes ``target`` a folder that already holds a checkpoint, if anything."""
    for pattern in ("latest", MANIFEST, "run.json", "run.lock", "*.safetensors", "pytorch_model*.bin", "*_states.pt"):
        if found := sorted(target.glob(pattern)):
            return found[0].name
    for states in sorted(target.glob("*/*_states.pt")):
        folder = states.parent
        if folder.suffix != ".partial" and not (folder == final and _whole(folder)):
            return folder.name
    if final != target and os.path.lexists(final) and (final.is_symlink() or not _whole(final)):
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
        self.target = target = target.resolve() if target.is_dir() and target.is_symlink() else target
        self.final = target if tag is None else target / tag
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.files = self.partial / _FILES
        self._lock = Lock(self.partial / _LOCK)
        self._made: list[Path] = []  # folders around the checkpoint that were not there
        self._resumable = False

    def join(self) -> None:
        """Hold the lock on a rank other than 0, so that nobody takes over while any rank of a broken run writes on."""
        with disk_errors(self.target):
            self._lock.join()

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    # --- before writing ----------------------------------------------------------------------------------------

    def _left_over(self) -> bool:
        """The work is done, except for the last steps of its process, which died: the last remove job, lock, folder."""
        try:
            found = set(os.listdir(self.partial))
        except (FileNotFoundError, NotADirectoryError):
            return False
        last = _FILES not in found and (_JOB in found or found <= {_LOCK})
        return last and not self.final.is_symlink() and _whole(self.final)

    def refuse(self) -> None:
        """Raise InvalidConfig if the target is not a place for a new checkpoint. Changes nothing."""
        above = next(folder for folder in self.target.parents if os.path.lexists(folder))
        if not above.is_dir():
            kind = "a link that leads nowhere" if above.is_symlink() else "not a folder"
            raise InvalidConfig(f"{above}, above the target {self.target}, is {kind}. Name another target.")
        if os.path.lexists(self.target) and not self.target.is_dir():
            kind = "a link that leads nowhere" if self.target.is_symlink() else "not a folder"
            raise InvalidConfig(f"the target {self.target} is {kind}. Name a new folder.")
        if self.partial.is_symlink():
            raise InvalidConfig(
                f"{self.partial} is a link, and nothing is written through one. Remove the link, or name a new folder."
            )
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
            around = self.partial.parent
            for folder in reversed([around, *around.parents]):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            self._lock.acquire(say)
            before = self._job()
            same, self._resumable = job is not None and before == job, job is not None
            if same and self._left_over():
                if self.final == self.target or (self.target / "latest").exists():
                    self._clear()
                    say(f"finished {self.final}: a killed run of this command had committed it")
                    return True
                os.rename(self.final, self.files)  # nothing names it yet: look at it file by file as at any other
            if self._left_over() and _occupied(self.target, self.final):  # of another job, or of one not known any more
                self._clear()
            self._refuse_occupied()  # somebody may have finished while we took the lock
            for path in self.partial.iterdir():
                if path.is_symlink():
                    path.unlink()
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
        """Remove every file under way but these: half-written ones, foreign ones, links to files and folders."""
        for parent, folders, files in os.walk(self.files):
            for path in (Path(parent, name) for name in (*files, *folders)):
                known = path.relative_to(self.files).as_posix() in names
                if path.is_symlink() or not (known or path.is_dir()):
                    path.unlink()

    # --- after writing -----------------------------------------------------------------------------------------

    def commit(
        self, manifest: Manifest, pointers: tuple[str, ...], beside: Mapping[str, bytes] = MappingProxyType({})
    ) -> Path:
        """Make the written folder the checkpoint: sync, manifest, rename, what lies beside it, then the pointers in
        order. Returns it."""
        with disk_errors(self.target):
            for written, _, _ in os.walk(self.files):
                fsync_folder(Path(written))
            write_manifest(self.files, manifest)
            check_complete(self.files)
            self._lock.check()
            self._refuse_occupied()
            if self.final != self.target and self.final.exists():
                os.rename(self.final, self.partial / _REPLACED)  # an abandoned growth, else refused above
            os.rename(self.files, self.final)
            for folder in {self.final.parent, *(made.parent for made in self._made)}:
                fsync_folder(folder)
            for name, content in beside.items():
                replace(self.target / name, content, self.partial)
            tag = self.final.relative_to(self.target).as_posix()  # a tag with a slash is a folder in a folder
            for name in pointers:
                set_latest(self.target, tag, name, scratch=self.partial)
            self._clear()
        return self.final

    def abort(self, say: Callable[[str], None]) -> None:
        """After an error: leave what is finished to the next run of the same command; if that is nothing, leave nothing
        behind: no partial folder, no empty folder that was made here."""
        if not self._lock.held:  # the partial folder is another's
            pass
        elif self._resumable and any(path.stat().st_size for path in self.partial.glob("finished.*.jsonl")):
            say(f"kept     {self.partial}: the same command goes on from there; delete it to give up")
        else:
            self._clear()
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()

    def _clear(self) -> None:
        """Remove what is left of the partial folder; the job last, for it tells what the rest is."""
        with contextlib.suppress(OSError):  # nothing that matters is in it any more
            for path in self.partial.iterdir():
                if path.name not in (_JOB, _LOCK):
                    _remove(path)
            _remove(self.partial / _JOB)
            self._lock.close()
            self.partial.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
