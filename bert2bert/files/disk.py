"""Files on a disk: syncing, small files replaced as a whole, errors of the disk as messages, and names that must stay
inside their folder.

Refuses (UserError, InvalidConfig) a disk without room or rights, and (InvalidCheckpoint) a name that leads elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath

from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError

_NO_PLACE = (  # what a path answers where nothing can be written, such as /proc's
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.EINVAL, errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.EOPNOTSUPP,
)  # fmt: skip
_LONGEST = 255  # bytes of a name in a folder


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make every name and every file's content below a folder durable."""
    for parent, _, files in os.walk(folder):
        for name in files:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))


def replace(path: Path, content: str | bytes, scratch: Path | None = None) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part; a link of its name is replaced
    and what it leads to stays. scratch: the folder, on the same disk, that a killed process may leave a part in
    (default: the file's own)."""
    fresh = (scratch or path.parent) / f".{path.name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)  # left by a killed process of this number, or a link to somewhere else
    try:
        with open(fresh, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    fsync_folder(path.parent)


def inside(folder: Path, name: str, links: bool = False) -> Path:
    """The file that a description lying in ``folder`` calls ``name``. InvalidCheckpoint for a name that is absolute,
    climbs up, or is a link to somewhere else (the blobs of a Hugging Face cache, where every file is a link, are not).
    links: whether a link may lead anywhere, as where a user has put large files on another disk and only reads them.
    """
    pure = PurePosixPath(name)
    path = folder / name
    long = any(len(part.encode(errors="replace")) > _LONGEST for part in pure.parts)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or long:
        raise InvalidCheckpoint(
            f"{folder}: names the file {name[:200]!r}, which is not inside the folder; it is not opened"
        )
    within = accumulate((str(folder), *pure.parts), os.path.join)
    next(within)
    if links or not any(map(os.path.islink, within)):
        return path
    home = folder.resolve()
    blobs = [(above.parent / "blobs").resolve() for above in home.parents if above.name == "snapshots"]
    homes = (home, *blobs)
    try:
        led = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise InvalidCheckpoint(f"{path}: cannot be followed ({error})") from None
    if not any(led.is_relative_to(place) for place in homes):
        raise InvalidCheckpoint(f"{path}: a link to {led}, outside of the folder; it is not opened")
    return path


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
        if error.errno in _NO_PLACE:
            raise InvalidConfig(
                f"{error.filename or path} cannot be written: {error.strerror}. Choose another target."
            ) from error
        raise
