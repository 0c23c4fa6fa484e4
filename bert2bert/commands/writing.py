"""What the commands `grow` and `reshard` share: a target is completed and refused, written, committed and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.commit.pending import check_complete
from bert2bert.checkpoints.commit.source_guard import Watch
from bert2bert.checkpoints.expert_parallel.target import with_experts
from bert2bert.checkpoints.job import TargetSpec, Values, check_folder
from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.source import Source
from bert2bert.checkpoints.spec import as_restored
from bert2bert.checkpoints.target import Target
from bert2bert.checkpoints.write import write_checkpoint
from bert2bert.ranks.comm import Comm
from bert2bert.terminal.progress import progress


def completed(spec: TargetSpec, source: Source, target: Target, folder: Path, comm: Comm) -> TargetSpec:
    """The target with its experts split; raises InvalidConfig, before any work is done, where it cannot be written."""
    spec = as_restored(with_experts(spec, source, target), source, target)
    if comm.rank == 0:
        check_folder(folder, spec, target)
    return spec


def write(
    folder: Path,
    spec: TargetSpec,
    values: Values,
    target: Target,
    watch: Watch,
    *,
    manifest: Manifest,
    expected: Mapping[tuple[str, str], str] | None = None,
    comm: Comm,
    say: Callable[[str], None],
    bar: str | None,
) -> Path:
    """Write the checkpoint, commit and report it; its folder.

    manifest, expected: see `write_checkpoint`. bar: what the progress bar calls the work; None: there is no bar.
    """
    total = len(spec.states) * 4 * sum(prod(shape) for shape in spec.shapes.values())
    show = bar is not None and comm.rank == 0  # of whose share of all bytes the bar is about right
    with progress(total // comm.size, bar or "", show=show) as done:
        written = write_checkpoint(
            folder, spec, values, target, manifest=manifest, expected=expected, comm=comm,
            progress=done.update, watch=watch, say=say,
        )  # fmt: skip
    if comm.rank == 0:
        say(f"written  {written}")
    return written


def written(folder: Path, how: str) -> dict[str, Any]:
    """What the manifest of a checkpoint that was written says of it, and of how it was made."""
    manifest = check_complete(folder).to_json()
    kept = ("tag", "format", "stage", "world_size", "precision", "group_layout", "counters", "versions", how)
    return {"folder": str(folder), **{key: manifest.get(key) for key in kept}}
