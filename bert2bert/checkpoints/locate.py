"""Where the files of a checkpoint lie: a run folder's tag, a tag itself, a Hugging Face folder, a snapshot in a cache.

Refuses, as InvalidCheckpoint, a place without a checkpoint, with what lies there instead: other tags, folders that hold
checkpoints, a file, an unfinished output.
"""

from __future__ import annotations

import re
from pathlib import Path

from bert2bert.checkpoints.hub.files import in_cache, is_hub
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.disk import inside


def _is_tag(folder: Path) -> bool:
    return (folder / "zero").is_dir() or any(folder.glob("*_states.pt"))


def tags(folder: Path) -> list[str]:
    """The checkpoint tags in a run folder, oldest first."""
    found = [p for p in folder.iterdir() if p.is_dir() and not p.name.endswith(".partial") and _is_tag(p)]
    return [p.name for p in sorted(found, key=lambda p: (p.stat().st_mtime, p.name))]


def _runs(folder: Path) -> list[str]:
    """The folders in this one that a checkpoint can be read from, such as the Trainer's checkpoint-500, by number."""
    found = [p.name for p in folder.iterdir() if p.is_dir() and ((p / "latest").is_file() or is_hub(p))]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else -1 for part in re.split(r"(\d+)", name)])


def _listed(folder: Path) -> str:
    found = tags(folder)
    return f"Tags there: {', '.join(found)}." if found else "There is no other tag there."


def locate(path: Path, tag: str | None) -> tuple[Path, str | None]:
    """The folder that holds the files, and its tag (None for a Hugging Face folder)."""
    if not path.exists():
        raise InvalidCheckpoint(f"{path}: no checkpoint there, the folder does not exist")
    if not path.is_dir():
        raise InvalidCheckpoint(f"{path}: a file; give the folder of the checkpoint ({path.parent})")
    if path.name.endswith(".partial"):
        raise InvalidCheckpoint(f"{path}: the output of an unfinished run. Run that command again to finish it.")
    if tag is not None:
        if (path / tag).is_dir() and _is_tag(path / tag):
            return path / tag, tag
        if path.name == tag and _is_tag(path):
            return path, tag
        raise InvalidCheckpoint(f"{path}: no checkpoint with tag '{tag}'. {_listed(path)}")
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            latest = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if not latest or not inside(path, latest, links=True).is_dir():
                raise InvalidCheckpoint(f"{path / name}: names the tag '{latest}', which is missing. {_listed(path)}")
            return path / latest, latest
    if _is_tag(path):
        return path, path.name
    if is_hub(path):
        return path, None
    if (snapshot := in_cache(path)) != path:
        return snapshot, None
    if tags(path):
        raise InvalidCheckpoint(f"{path}: no file 'latest' says which tag to use; name one. {_listed(path)}")
    if runs := _runs(path):
        raise InvalidCheckpoint(
            f"{path}: no checkpoint itself, but {len(runs)} of the folders in it are. Give one; the last by its number "
            f"is {path / runs[-1]}."
        )
    raise InvalidCheckpoint(
        f"{path}: no checkpoint there. Expected a DeepSpeed run folder (with 'latest'), one of its tags (with "
        "*_optim_states.pt or zero/), or a Hugging Face folder (with *.safetensors)."
    )
