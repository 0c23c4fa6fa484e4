"""A folder's lock: who writes there now, in a file that names host, process and job, and that shows that they live.

There are two proofs of life, for file systems differ. The kernel's `flock`, held by every rank that shares the lock,
goes with its last holder; but a network file system may keep it to one host, or have none. So the file also says who
holds it, and its time of change is renewed every `BEAT` seconds. Another process refuses at once where the kernel, or a
living process of its own host, says that the folder is in use; it takes over at once from a dead process of its own
host, and from an earlier start of its own Slurm job; a holder elsewhere it watches, for `SILENT` seconds by its own
clock (the clocks of hosts differ), and takes over if the file was not renewed. A holder that was frozen for so long
notices.

Refuses (InvalidConfig) a folder that another process holds, naming it, and (UserError, by `check`) to go on without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidConfig, UserError

BEAT, SILENT = 10.0, 120.0  # seconds; a network file system may show another host's change a minute late
POLL, PATIENCE = 1.0, 10.0  # seconds between looks, and of waiting without a word
SETTLE = 2.0  # seconds in which another that takes over at the same moment shows itself
_TRIES = 100
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
_JOBS = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF"}
Holder = dict[str, Any]


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _began(pid: Any) -> str:
    """When a process of this host was started, in the kernel's ticks; "" if there is none, or only its remains."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _numbers() -> str:
    """The namespace that numbers this process: another container's numbers mean other processes."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def me() -> Holder:
    """What the file says of its holder. ``boot``: of the kernel; ``numbers``, ``began``: what makes ``pid`` unique."""
    job = next((f"{name} job {os.environ[key]}" for key, name in _JOBS.items() if os.environ.get(key)), None)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "boot": _read("/proc/sys/kernel/random/boot_id").strip() or socket.gethostname(),
        "numbers": _numbers(),
        "began": _began(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _lives(holder: Holder, own: Holder, kernel: bool) -> bool | None:
    """Whether a holder lives, None where that cannot be known. kernel: its `flock` would have kept us out."""
    if holder.get("boot") == own["boot"]:
        if holder.get("numbers") == own["numbers"]:
            return bool(holder.get("began")) and _began(holder.get("pid")) == holder["began"]
        return False if kernel else None
    if own["job"] and holder.get("job") == own["job"]:
        restarts = holder.get("restarts")
        return False if isinstance(restarts, int) and restarts < own["restarts"] else None
    return None


def _named(holder: Holder) -> str:
    if "pid" not in holder:
        return "another process"
    since = f"since {holder.get('since')}"
    return f"process {holder['pid']} on {holder.get('host')} ({', '.join(filter(None, (holder.get('job'), since)))})"


class Lock:
    """``path``: the lock's file. One process calls `acquire`, others that write with it `join`, and all `close`.

    ``held``: whether this process has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._own: Holder | None = None  # of the one that acquired it
        self._made: list[Path] = []
        self._closed = threading.Event()

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock, making its folder if there is none. InvalidConfig if somebody has it; OSError passes.

        ``say``: receives what is waited for, and from whom the folder is taken over.
        """
        seen: tuple[Any, float] | None = None
        while True:
            fd, new = self._open()
            try:
                while (kernel := self._flock(fd, fcntl.LOCK_EX)) is None:
                    if not new:  # else it is another's short look at what is ours
                        raise self._in_use(_parse(fd))
                    time.sleep(0.01)
                if not self._is(fd):  # its owner removed it while we came
                    os.close(fd)
                    continue
                holder, own = _parse(fd), me()
                lives = False if new else _lives(holder, own, kernel)
                mark = (os.fstat(fd).st_mtime_ns, holder)
                if lives or (seen is not None and mark != seen[0]):
                    raise self._in_use(holder)
                seen = seen or (mark, time.monotonic())
                silent = time.monotonic() - seen[1] > SILENT
                if lives is False or silent:
                    self._take(fd, own, certain=new or (kernel and not silent))
                    if holder:
                        say(f"{self.path.parent}: taken over from {_named(holder)}, which is gone")
                    return
            except BaseException:
                if new:  # a full disk, say
                    self.path.unlink(missing_ok=True)
                    self._unmake()
                os.close(fd)
                raise
            os.close(fd)
            waited = time.monotonic() - seen[1]
            if waited <= PATIENCE < waited + POLL:
                say(
                    f"waiting: {self.path.parent} is held by {_named(holder)}, which cannot be seen from here; it is "
                    f"taken over if there is no sign of life for {SILENT:g} s (delete {self.path} if it is surely gone)"
                )
            time.sleep(POLL)

    def _open(self) -> tuple[int, bool]:
        """The file, and whether it was made here; never one that a link leads to."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        for again in reversed(range(_TRIES)):
            missing = [folder for folder in self.path.parents if not folder.exists()]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made = self._made or missing
                try:
                    return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
                except FileExistsError:
                    pass
                try:
                    return os.open(self.path, flags), False
                except OSError as error:
                    if error.errno != errno.ELOOP:
                        raise
                    self.path.unlink(missing_ok=True)
            except FileNotFoundError:  # a finishing holder removes the folder, too
                if not again:
                    raise  # or the folder is such that nothing can be made in it
        raise FileNotFoundError(errno.ENOENT, "it comes and goes", str(self.path))

    @staticmethod
    def _flock(fd: int, kind: int) -> bool | None:
        """True: taken, None: another has it, False: this file system has no locks."""
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _is(self, fd: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        return False

    def _in_use(self, holder: Holder) -> InvalidConfig:
        return InvalidConfig(
            f"{self.path.parent} is in use: {_named(holder)} writes there. Wait for its end, or name another folder"
        )

    def _take(self, fd: int, own: Holder, certain: bool) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, (json.dumps(own) + "\n").encode(), 0)
        os.fsync(fd)
        if not certain:  # another host may do the same, and the last one has it
            time.sleep(SETTLE)
            if (now := self._now()) != own:
                raise self._in_use(now or {})
        self._share(fd)
        self._fd, self._own = fd, own
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def join(self) -> None:
        """Share the lock on another rank of its holder, so that on this host nobody takes over while any rank of a
        broken run writes on."""
        with contextlib.suppress(OSError):  # a folder that is not shared is found out where it matters
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._share(self._fd)

    def _share(self, fd: int) -> None:
        """Hold the kernel's lock with others. One that only looks has it for a moment."""
        until = time.monotonic() + SETTLE
        while self._flock(fd, fcntl.LOCK_SH) is None:
            if time.monotonic() > until:
                raise self._in_use(_parse(fd))
            time.sleep(0.01)

    def _now(self) -> Holder | None:
        """Whom the file names now; None: there is none."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                return None
            return self._own  # the file system is away: nobody else can write there either
        try:
            return _parse(fd)
        finally:
            os.close(fd)

    @property
    def lost(self) -> bool:
        """Whether another process took over, or somebody deleted the file, while this one thought that it had it."""
        return self._own is not None and not self._closed.is_set() and self._now() != self._own

    def check(self) -> None:
        """Raise UserError if the lock was lost."""
        if self.lost:
            now = self._now()
            what = f"{_named(now)} has taken over" if now else f"somebody deleted {self.path.name} of"
            raise UserError(f"{what} {self.path.parent}, so this process writes there no more")

    def _beat(self) -> None:
        while not self._closed.wait(BEAT) and not self.lost:
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)

    def close(self) -> None:
        """Give the lock back, and leave no folder behind that was made for it alone."""
        if self._fd is None:
            return
        if self._own is not None and not self.lost:
            self._closed.set()
            self.path.unlink(missing_ok=True)
        self._closed.set()
        os.close(self._fd)
        self._fd = None
        if self._own is not None:
            self._unmake()

    def _unmake(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def _parse(fd: int) -> Holder:
    try:
        found = json.loads(os.pread(fd, 1 << 12, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
