"""Where a run goes on that is started again by the same command: `--resume auto`.

The newest checkpoint of the run's own folder that is whole and undamaged, else the one that the run is to start from.
A damaged one is named and passed over. Refuses (`InvalidCheckpoint`) a folder all of whose checkpoints are damaged.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from bert2bert.checkpoints.commit.pending import check_complete, check_contents, file_sizes, set_latest
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.errors import InvalidCheckpoint
from bert2bert.ranks.comm import on_first
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.train.job import Job
from bert2bert.train.save import tags

AUTO = "auto"
"""What `--resume` is given for it."""


def newest_undamaged(job: Job) -> Path | None:
    """The newest checkpoint of the run's folder whose files are those of its manifest; None if there is none at all.
    Damaged ones are moved aside, to ``NAME.damaged``. Collective: each rank reads its share of the files.
    """
    faults: list[str] = []
    for folder in on_first(RANKS, lambda: _newest_first(job.output)):
        if (fault := _fault(folder)) is None:
            if faults:
                write_on_first(job.output, partial(set_latest, job.output, folder.name))
            return folder
        faults.append(fault)
        aside = folder.with_name(folder.name + ".damaged")
        job.warn(f"note: passed over a damaged checkpoint, and moved it to {aside}: {fault}")
        write_on_first(job.output, partial(_move, folder, aside))
    if faults:
        raise InvalidCheckpoint(
            f"{job.output}: all of its checkpoints were damaged, {len(faults)} of them: {faults[0]}\nRestore one under "
            "its name, without .damaged, or start in a new folder"
        )
    return None


def _newest_first(output: Path) -> list[Path]:
    """The folders of a run's finished checkpoints."""
    found = tags(output) if output.is_dir() else ()
    return [path for _, path in found if (path / MANIFEST).exists()]


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, found by all ranks together; None if nothing is."""
    try:
        check_complete(folder)
        names = [MANIFEST, *file_sizes(folder)]
        check_contents(folder, names[RANKS.rank :: RANKS.size])
        found = None
    except (InvalidCheckpoint, OSError) as error:
        found = str(error)
    return next((fault for fault in RANKS.allgather(found) if fault is not None), None)


def _move(folder: Path, aside: Path) -> None:
    if os.path.lexists(aside):
        shutil.rmtree(aside)
    folder.rename(aside)
