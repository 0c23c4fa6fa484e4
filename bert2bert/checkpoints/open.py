"""Open the checkpoint that lies at a path, whatever its format.

`locate` finds its files: a DeepSpeed run folder with its ``latest``, one tag of it, a universal checkpoint, a Hugging
Face folder, a snapshot in the hub's cache. `open_source` chooses the reader, and checks all that can be checked without
reading tensors.

Refuses, as InvalidCheckpoint with one message each: a place without a checkpoint, with what lies there instead (other
tags, folders that hold checkpoints, a file, an unfinished output); a ``latest`` that names a missing tag; files that
are not those of the manifest beside them; and whatever the format's own reader refuses.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from bert2bert.checkpoints.expert_parallel.reader import ExpertSource
from bert2bert.checkpoints.hub.files import in_cache, is_hub, plain
from bert2bert.checkpoints.hub.reader import HubSource
from bert2bert.checkpoints.manifest import MANIFEST, Manifest, check_sizes, read_manifest
from bert2bert.checkpoints.source import MALFORMED, Source, cause
from bert2bert.checkpoints.stacked import as_in_models
from bert2bert.checkpoints.universal.reader import UniversalSource
from bert2bert.checkpoints.zero.reader import ZeroSource
from bert2bert.checkpoints.zero.stage0_reader import Stage0Source, is_stage0
from bert2bert.checkpoints.zero.tag_files import expert_files
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.disk import inside
from bert2bert.files.texts import read_json


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


def _config(folder: Path, tag: str | None) -> dict[str, Any] | None:
    above = len(PurePosixPath(tag).parts) if tag is not None else 0  # a tag can have slashes
    for place in (folder, *folder.parents[:above]):
        if (place / "config.json").is_file():
            return plain(read_json(place / "config.json"))
    return None


def open_source(path: str | Path, tag: str | None = None) -> Source:
    """Open the checkpoint at ``path``: a run folder, a tag's folder, or a Hugging Face folder.

    ``tag`` picks one tag of a run folder; without it ``latest`` (else ``latest_universal``) does.
    Raises InvalidCheckpoint for anything that is not a sound checkpoint.
    """
    path = Path(path)
    folder, tag = locate(path, tag)
    manifest = read_manifest(folder)
    if manifest:
        check_sizes(folder, manifest)
    kind: type[Source] = HubSource
    if tag is not None:
        native = ExpertSource if expert_files(folder) else Stage0Source if is_stage0(folder) else ZeroSource
        kind = UniversalSource if (folder / "zero").is_dir() else native
    try:
        source = kind(path, folder, manifest)
        if kind is HubSource:  # a manifest lists a model's own names, which may be one an expert
            source = as_in_models(source, keep=manifest.tensors if manifest else ())
    except MALFORMED as error:  # files are believed until they contradict themselves, which can show anywhere
        raise InvalidCheckpoint(
            f"{folder}: its contents are not those of a checkpoint ({cause(error)}): damaged, of another program, or "
            "of two checkpoints. Restore the files or use another tag."
        ) from error
    source.tag = tag
    _check_names(source)
    model = dict(manifest.model) if manifest and manifest.model else None
    source.config = model or _config(folder, tag)
    if manifest:
        _check_manifest(source, manifest)
        order = {name: source.tensors[name] for name in manifest.tensors if name in source.tensors}
        source.tensors = {**order, **source.tensors}  # the manifest has the model's order where the files do not
        aliases = {absent: kept for absent, kept in manifest.aliases.items() if kept in source.tensors}
        source.aliases = {**aliases, **source.aliases}
        source.files.append(folder / MANIFEST)
    return source


def _check_names(source: Source) -> None:
    """Names that stay inside a folder: a universal checkpoint has a folder of each tensor's name."""
    for name in source.tensors:
        path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("..")
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(name):
            raise InvalidCheckpoint(
                f"{source.folder}: holds a tensor named {name!r}, which is not a name of a parameter"
            )


def _check_manifest(source: Source, manifest: Manifest) -> None:
    """The files are those that the manifest describes: format, stage, world size, every name and shape."""
    pairs: dict[str, tuple[Any, Any]] = {"format": (source.format, manifest.format)}
    if source.format == "zero":
        for key in ("stage", "world_size", "precision"):
            pairs[key] = getattr(source, key), getattr(manifest, key)
        if source.expert_parallel:
            pairs["expert_parallel"] = source.expert_parallel.size, manifest.expert_parallel
    for key, (found, recorded) in pairs.items():
        if recorded is not None and found != recorded:
            raise InvalidCheckpoint(
                f"{source.folder}: the files have {key} {found!r}, the manifest says {recorded!r}: they are of "
                "two checkpoints. Restore the files or use another tag."
            )
    listed = {name: tuple(entry.shape) for name, entry in manifest.tensors.items()}
    have = {name: meta.shape for name, meta in source.tensors.items()}
    for name in sorted(listed.keys() | have.keys()) if listed else ():
        if listed.get(name) != have.get(name):
            raise InvalidCheckpoint(
                f"{source.folder}: tensor '{name}' has shape {have.get(name, 'none (absent)')} in the files, "
                f"{listed.get(name, 'none (absent)')} in the manifest: they are of two checkpoints."
            )
