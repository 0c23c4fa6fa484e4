"""How training runs stand, by their folders alone: from a login node, while another host writes them.

A run's state is what its folder shows: a finish, an end or an error noted in run.json, a lock that is renewed. What is
half written is left out. Refuses (InvalidData) a folder that is no run's. Imports no torch and writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidData

SILENT = 120.0
"""Seconds without a renewal after which a lock counts as left behind: those of `files.lock`."""
BEAT = 10.0
"""Seconds between two renewals: those of `files.lock`."""
_TAIL = 1 << 18  # bytes at the end of metrics.jsonl that are read
STATES = ("starting", "running", "stopped", "paused", "failed", "finished", "silent")


@dataclass(frozen=True)
class Status:
    """One run."""

    run: str
    """Its folder."""
    state: str
    """One of `STATES`: 'silent' has shown no sign of life for two minutes, and noted no end."""
    why: str | None
    """Of a run that was stopped (the signal), has paused (the phase), or failed (the error)."""
    silent_seconds: float
    """Since its folder last changed."""
    step: int | None
    steps: int | None
    """In all; None where the recipe does not say."""
    phase: str | None
    growths: int
    loss: float | None
    held_out: float | None
    tokens_per_s: float | None
    mfu: float | None
    seconds_left: float | None
    """By the speed of the last records."""
    checkpoint: str | None
    checkpoint_bytes: int | None
    disk_left_bytes: int

    def as_json(self) -> dict[str, Any]:
        """As ``status --json`` prints it."""
        return asdict(self)


def statuses(paths: Sequence[Path]) -> list[Status]:
    """How the runs in some folders stand. Raises InvalidData for a folder that is no run's.

    Where a lock looks left behind, or is of a time to come, this host's clock may be wrong: it is given one more beat.
    """
    found = [status(path) for path in paths]
    before = [_time_of(path / "run.lock") for path in paths]
    doubtful = [
        renewed is not None
        and (one.state == "silent" or (one.state in ("starting", "running") and renewed > time.time() + 1))
        for one, renewed in zip(found, before, strict=True)
    ]
    if not any(doubtful):
        return found
    time.sleep(1.2 * BEAT)
    return [
        status(path, _time_of(path / "run.lock") != renewed) if doubt else one
        for path, one, renewed, doubt in zip(paths, found, before, doubtful, strict=True)
    ]


def status(path: Path, alive: bool | None = None) -> Status:
    """How the run in a folder stands. ``alive``: whether its lock was seen to be renewed, where that is known; else
    the lock's time and this host's clock decide. Raises InvalidData for a folder that is no run's."""
    about, lock = _json(path / "run.json"), path / "run.lock"
    if not path.is_dir() or (about is None and not lock.exists()):
        raise InvalidData(f"{path} is not a run's folder: no run.json and no run.lock; name the --output of a run")
    about = about or {}
    records = _records(path / "metrics.jsonl")
    train = [record for record in records if record.get("kind") == "train"]
    evals = [record for record in records if record.get("kind") == "eval"]
    last, steps = records[-1] if records else {}, _steps(about)
    state, why = _state(about, lock, bool(train), alive)
    tag = _text(path / "latest")
    folder = path / tag if tag else None
    return Status(
        run=str(path),
        state=state,
        why=why,
        silent_seconds=_age(path, lock),
        step=last.get("step"),
        steps=steps,
        phase=last.get("phase"),
        growths=int(last.get("growths") or 0),
        loss=train[-1].get("loss") if train else None,
        held_out=evals[-1].get("loss") if evals else None,
        tokens_per_s=train[-1].get("tokens_per_s") if train else None,
        mfu=train[-1].get("mfu") if train else None,
        seconds_left=_left(train, steps) if state == "running" else None,
        checkpoint=tag,
        checkpoint_bytes=_size(folder) if folder is not None and folder.is_dir() else None,
        disk_left_bytes=shutil.disk_usage(path).free,
    )


def render(found: Sequence[Status]) -> str:
    """Several runs as a table, for a terminal, and below it why those stopped that did."""
    rows = [("run", "state", "step", "phase", "loss", "held out", "tokens/s", "MFU", "left", "checkpoint", "disk left")]
    for one in found:
        step = "-" if one.step is None else f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else "")
        state = f"silent {_time(one.silent_seconds)}" if one.state == "silent" else one.state
        size = "" if one.checkpoint_bytes is None else f" ({one.checkpoint_bytes / 1e9:.3g} GB)"
        rows.append(
            (
                one.run, state, step, one.phase or "-", _number(one.loss, ".3f"), _number(one.held_out, ".3f"),
                _number(one.tokens_per_s, ",.0f"), _number(one.mfu, ".1%"), _time(one.seconds_left),
                (one.checkpoint or "-") + size, f"{one.disk_left_bytes / 1e9:.3g} GB",
            )
        )  # fmt: skip
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, wide, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{one.run}: {one.state}: {one.why}" for one in found if one.why)])


def _state(about: dict[str, Any], lock: Path, trained: bool, alive: bool | None) -> tuple[str, str | None]:
    """The run's state, and why it ended."""
    if about.get("finished"):
        return "finished", None
    renewed = _time_of(lock)
    if renewed is not None and (time.time() - renewed < SILENT if alive is None else alive):
        return ("running" if trained else "starting"), None
    start = (about.get("continued") or [about])[-1]
    ended = start.get("ended") if isinstance(start, dict) else None
    if isinstance(ended, dict) and ended.get("how") in STATES:
        return str(ended["how"]), None if ended.get("why") is None else str(ended["why"])
    return "silent", None


def _time_of(lock: Path) -> float | None:
    """When a lock was last renewed, by the clock of its file system. Opened, so that a network file system asks."""
    with contextlib.suppress(OSError), lock.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime
    return None


def _age(path: Path, lock: Path) -> float:
    """Seconds since the folder last changed, by this host's clock."""
    times = []
    for file in (lock, path / "metrics.jsonl", path / "run.json", path):
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(time.time() - max(times), 0.0) if times else 0.0


def _steps(about: dict[str, Any]) -> int | None:
    phases = (about.get("recipe") or {}).get("phases") or []
    counts = [phase.get("steps") for phase in phases]
    return sum(counts) if counts and None not in counts else None


def _left(train: Sequence[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds for the rest of the steps, as long as the last records took for theirs."""
    if steps is None or len(train) < 2:
        return None
    first, last = train[max(len(train) - 20, 0)], train[-1]
    done = last["step"] - first["step"]
    return (last["seconds"] - first["seconds"]) / done * (steps - last["step"]) if done > 0 else None


def _records(file: Path) -> list[dict[str, Any]]:
    """The last records of metrics.jsonl that are whole."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - _TAIL, 0))
        for line in stream.read().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    found.append(record)
    return found


def _json(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _text(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").strip() or None
    return None


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
