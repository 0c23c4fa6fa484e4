"""The run folder: what a run is (run.json, recipe, configs, tokenizer), and whether a folder may be written to.

Refuses a new run in a folder that holds another one, or anything else's checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Recipe

RUN = "run.json"


def check_free(output: Path, resume: Path | None) -> bool:
    """Whether the run continues in its own folder. Raises InvalidConfig when ``output`` belongs to something else.

    A run that was stopped before its first checkpoint leaves nothing to continue, so its folder may be taken again.
    """
    if output.exists() and not output.is_dir():
        raise InvalidConfig(f"--output {output} is a file; expected a folder for the run")
    latest, run = output / "latest", output / RUN
    if resume is not None and run.is_file() and output.resolve() in (resume.resolve(), resume.resolve().parent):
        return True  # the run's folder, or one of its tags
    if latest.exists() or (output / "bert2bert.json").exists():
        if run.is_file():
            remedy = f"continue it with --resume {output}, or name a new folder"
        else:
            remedy = "name a new folder (--resume takes the checkpoint, --output the run's own folder)"
        raise InvalidConfig(f"--output {output} already holds a {'run' if run.is_file() else 'checkpoint'}; {remedy}")
    if resume is not None and resume.resolve().is_relative_to(output.resolve()) and output.exists():
        raise InvalidConfig(f"--resume {resume} lies inside --output {output}; give a new output folder")
    return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def git_commit() -> str | None:
    """The commit of this source tree, with "-dirty" when it was changed; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


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
    versions: Mapping[str, str],
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
        before = json.loads((output / RUN).read_text(encoding="utf-8"))
        again = {key: about[key] for key in ("command", "versions", "git_commit", "world_size")}
        again |= {"step": step, "started": about["started"]}
        about |= {
            key: before[key] for key in ("command", "versions", "git_commit", "source", "started") if key in before
        }
        about["continued"] = [*before.get("continued", []), again]
    write_json(output / RUN, about)
    write_json(output / "ds_config.json", dict(ds_config))
    write_json(output / "config.json", dict(model))
    shutil.copyfile(bins / "tokenizer.json", output / "tokenizer.json")
    if recipe_file is not None and recipe_file.resolve() != (output / "recipe.py").resolve():
        shutil.copyfile(recipe_file, output / "recipe.py")


def finish(output: Path) -> None:
    """Note in run.json that the run reached its end."""
    about = json.loads((output / RUN).read_text(encoding="utf-8"))
    write_json(output / RUN, about | {"finished": now()})
