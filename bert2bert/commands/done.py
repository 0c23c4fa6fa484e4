"""Whether a target already holds the growth that is asked for: then the same command again is a success."""

from __future__ import annotations

from pathlib import Path

from bert2bert.checkpoints.commit.pending import check_complete
from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.target import Target
from bert2bert.errors import InvalidCheckpoint
from bert2bert.growth.opened import Growth


def done(growth: Growth, spec: TargetSpec, folder: Path, target: Target) -> Path | None:
    """The checkpoint in ``folder``, if it is this growth, complete and in this layout."""
    hub = target.format == "hub"
    place = folder if hub else folder / spec.tag
    if not place.is_dir() or not (hub or (folder / "latest").is_file()):
        return None
    try:
        found = check_complete(place)
    except InvalidCheckpoint:
        return None
    same = same_growth(growth, found) and (found.format, found.stage, found.world_size, found.expert_parallel) == (
        target.format, target.stage, target.ranks, target.expert_parallel
    )  # fmt: skip
    return place if same and (found.precision, found.group_layout) == (spec.precision, spec.group_layout) else None


def same_growth(growth: Growth, manifest: Manifest) -> bool:
    """Whether a manifest is of this growth of this source, in whatever layout."""
    made = manifest.growth
    if made is None or made.plan_digest != growth.plan.digest():
        return False
    return bool(made.source.get("sha256") == growth.model.source.identity()["sha256"])
