"""The run folder: what a run is (run.json, recipe, configs, tokenizer), whether a run may have it, and its lock.

Nothing is written through a link: one of a file's name is replaced by the file, and what it leads to stays as it is.
Refuses (InvalidConfig) a new run in a folder that holds another one, anything else's checkpoint or an unfinished
growth, and a folder that another process uses.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.errors import InvalidConfig
from bert2bert.files.checkout import git_commit
from bert2bert.files.disk import replace
from bert2bert.files.lock import Lock
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.recipe import Recipe
from bert2bert.train.save import whole

RUN, LOCK = "run.json", "run.lock"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""Files of the tokenizer, which a run takes over from its bins."""


def check_folder(output: Path) -> None:
    """Raise InvalidConfig if ``output`` is no folder and cannot become one. A link to a folder is one."""
    if os.path.lexists(output) and not output.is_dir():
        what = "a link that leads nowhere" if output.is_symlink() else "a file"
        raise InvalidConfig(f"--output {output} is {what}; expected a folder for the run")


def claim(output: Path, resume: Path | None) -> tuple[bool, Path | None]:
    """(whether the run goes on in its own folder, what it really resumes from); writes nothing.

    ``resume`` may be ``output`` itself without a checkpoint there yet: then the run starts, so that one command line
    serves start and restart. Raises InvalidConfig when ``output`` belongs to something else. A run that was stopped
    before its first checkpoint leaves nothing to continue, so its folder may be taken again.
    """
    run, home = (output / RUN).is_file(), output.resolve()
    newest = whole(output)
    if os.path.lexists(output / "latest") or (output / MANIFEST).exists() or newest:
        if run and resume is not None and home in (resume.resolve(), resume.resolve().parent):
            _read(output)
            lost = resume.resolve() == home and not os.path.lexists(output / "latest")  # killed before it was written
            return True, newest if lost else resume
        if run:
            remedy = f"continue it with --resume {output}, or name a new folder"
        else:
            remedy = "name a new folder (--resume takes the checkpoint, --output the run's own folder)"
        raise InvalidConfig(f"--output {output} already holds a {'run' if run else 'checkpoint'}; {remedy}")
    if growth := next(output.glob("*.partial/job.json"), None):
        raise InvalidConfig(
            f"--output {output} holds an unfinished growth ({growth.parent.name}); finish it by running its command "
            "again, delete it, or name a new folder"
        )
    if resume is not None and resume.resolve() == home:
        return False, None
    if resume is not None and resume.resolve().is_relative_to(home):
        raise InvalidConfig(f"--resume {resume} lies inside --output {output}; give a new output folder")
    return False, resume


@contextmanager
def locked(output: Path) -> Iterator[Lock]:
    """Hold the run's folder for as long as the statement lasts. Every rank calls it; raises InvalidConfig on all when
    another process has the folder."""
    lock = Lock(output / LOCK)
    write_on_first(output, lambda: lock.acquire(lambda text: print(text, file=sys.stderr, flush=True)))
    try:
        if RANKS.rank != 0:
            lock.join()
        yield lock
    finally:
        lock.close()


def _read(output: Path) -> dict[str, Any]:
    """What run.json says; InvalidConfig where it is torn."""
    try:
        about = json.loads((output / RUN).read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not isinstance(about.get("continued", []), list):
            raise ValueError("not the object that a run writes")
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"{output / RUN} is damaged ({error}), and with it what the run there is. Put back a copy of it, or go on "
            f"from its checkpoint in a new folder: --resume {output} --output NEW"
        ) from None
    return about


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    replace(path, json.dumps(value, indent=1) + "\n")


def _copy(source: Path, path: Path) -> None:
    """Copy a file over one of any kind, so that a reader sees the old or the new."""
    if path.is_symlink() or not (path.exists() and path.samefile(source)):
        replace(path, source.read_bytes())


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe(
    output: Path,
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    world: int,
    versions: Mapping[str, str | None],
    command: Sequence[str] | None,
    source: Mapping[str, Any] | None,
    continued: bool,
    step: int,
    bins: Path,
    recipe_file: Path | None,
) -> None:
    """Write everything about a run that starts (or, ``continued``, goes on in its folder) but its metrics."""
    output.mkdir(parents=True, exist_ok=True)
    command = list(sys.argv if command is None else command)
    about: dict[str, Any] = {
        "name": recipe.name,
        "command": command,
        "versions": dict(versions),
        "git_commit": git_commit(),
        "recipe": recipe.to_dict(),
        "ds_config": dict(ds_config),
        "world_size": world,
        "model": dict(model),
        "data": dict(data),
        "source": None if source is None else dict(source),
        "started": now(),
        "finished": None,
        "continued": [],
    }
    if continued:
        before = _read(output)
        again = {key: about[key] for key in ("command", "versions", "git_commit", "world_size")}
        again |= {"step": step, "started": about["started"]}
        about |= {
            key: before[key]
            for key in ("command", "versions", "git_commit", "source", "started", "growths", "ended")
            if key in before
        }
        about["continued"] = [*before.get("continued", []), again]
    write_json(output / RUN, about)
    write_json(output / "ds_config.json", dict(ds_config))
    write_json(output / "config.json", dict(model))
    for name in TOKENIZER:
        if (bins / name).is_file():
            _copy(bins / name, output / name)
    if recipe_file is not None:
        _copy(recipe_file, output / "recipe.py")


def grew(output: Path, model: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Note a growth in run.json, once (``entry``: "phase", "step", "seconds"), and the grown model, whose config.json
    it writes."""
    if not (output / RUN).is_file():
        return  # the run begins with it
    about = _read(output)
    growths = [one for one in about.get("growths", []) if one.get("phase") != entry["phase"]]
    write_json(output / RUN, about | {"model": dict(model), "growths": [*growths, dict(entry)]})
    write_json(output / "config.json", dict(model))


def ended(output: Path, how: str, why: str, step: int) -> None:
    """Note in run.json that this start of the run has ended: "stopped" by a signal, "paused" behind a phase, "failed".

    ``why``: the signal, the phase, the error. Does nothing before the run was described.
    """
    if not (output / RUN).is_file():
        return
    about = _read(output)
    start = about["continued"][-1] if about.get("continued") else about
    start["ended"] = {"how": how, "why": why, "step": step, "time": now()}
    write_json(output / RUN, about)


def finish(output: Path) -> None:
    """Note in run.json that the run reached its end."""
    write_json(output / RUN, _read(output) | {"finished": now()})
