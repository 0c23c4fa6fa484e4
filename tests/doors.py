"""The commands `grow` and `reshard` and the writer, with a target's options as keywords, as they are typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert2bert.checkpoints import write
from bert2bert.checkpoints.job import TargetSpec, Values
from bert2bert.checkpoints.manifest import Grown, Manifest
from bert2bert.checkpoints.target import Target, file_bytes
from bert2bert.commands import grow as growing
from bert2bert.commands import reshard as resharding

_OPTIONS = ("format", "stage", "world_size", "expert_parallel", "precision", "groups", "shard_size")


def target(how: dict[str, Any]) -> Target:
    """Takes the options of a target out of ``how``."""
    found = {name: how.pop(name) for name in _OPTIONS if name in how}
    if isinstance(found.get("shard_size"), str):
        found["shard_size"] = file_bytes(found["shard_size"])
    return Target(**found, tag=how.pop("target_tag", None))


def grow(source: Path, folder: Path, config: Path, **how: Any) -> Path:
    return growing.grow(source, folder, config, target(how), **how)


def reshard(source: Path, folder: Path, **how: Any) -> Path:
    return resharding.reshard(source, folder, target(how), **how)


def write_checkpoint(
    folder: Path, spec: TargetSpec, values: Values, *, manifest_growth: dict[str, Any] | None, **how: Any
) -> Path:
    growth = None if manifest_growth is None else Grown.from_json(manifest_growth)
    manifest = Manifest(kind="growth", growth=growth)
    return write.write_checkpoint(folder, spec, values, target(how), manifest=manifest, **how)
