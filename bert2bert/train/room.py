"""How much a checkpoint takes: of the disk, and of a host's memory while it is written behind training.

Refuses (UserError) a disk without room for the next one, before anything of it is written.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.errors import UserError
from bert2bert.files.memory import free_memory
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.recipe import Recipe
from bert2bert.train.engine import Engine

_RANDOM = 20_000  # bytes of a rank's random state: torch's, Python's and NumPy's generators
_BLOCK = 1 << 12  # a file's last block
# Bytes of a checkpoint that are no numbers: names, shapes, and torch's record of every tensor in a file. Measured with
# names of usual length; a little above.
_NAMED = 450  # of a name in the manifest
_HELD = 1_800  # of a parameter in a file of stage 0, moments included
_MODEL = 600  # in the model's weights at stages 1 to 3
_GROUP = 2_600  # of an optimizer group in a rank's shard


def disk(engine: Engine) -> int:
    """Bytes that a checkpoint takes, at most by a few kB a rank: at every stage and precision."""
    elements, low = engine.numel, 4 if engine.precision == "fp32" else 2
    names, groups, world = len(engine.names), len(engine.cuts), engine.world
    buffers = sum(buffer.nbytes for buffer in engine.buffers().values())
    beside = names * _NAMED + world * (_RANDOM + 3 * _BLOCK) + 2 * _BLOCK
    if engine.stage == 0:  # weights and moments in one file; in 16 bits the float32 weights, too
        return elements * (12 if low == 4 else 14) + buffers + names * _HELD + beside
    shards = 12 * (elements + _padding(engine)) + world * groups * _GROUP
    if engine.stage == 3:  # weights are in the shards alone
        return shards + world * (buffers + names * _MODEL) + beside
    return shards + elements * low + buffers + names * _MODEL + beside


def memory(engine: Engine) -> int:
    """Bytes of this rank's part: what it holds of the host's memory while its files are written behind training."""
    elements, low = engine.numel, 4 if engine.precision == "fp32" else 2
    if engine.stage == 0:
        return elements * (12 if low == 4 else 14) if engine.rank == 0 else 0
    model = elements * low if engine.stage < 3 and engine.rank == 0 else 0
    return model + 12 * -(-(elements + _padding(engine)) // engine.world)


def _padding(engine: Engine) -> int:
    """Elements over all ranks that make partitions equal, at most: of groups, at stage 3 of parameters."""
    parts = len(engine.names) if engine.stage == 3 else 2 * len(engine.cuts)
    return parts * engine.world


def check_disk(engine: Engine, root: Path, folder: Path) -> None:
    """Raise UserError if the disk of ``root`` has no room for one more checkpoint, ``folder``."""
    need, free = disk(engine), shutil.disk_usage(root).free
    if free < need:
        raise UserError(
            f"checkpoint {folder} needs about {need / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB free. "
            "The checkpoints written before are whole; free some space and resume"
        )


def notes(engine: Engine, recipe: Recipe, output: Path, step: int) -> list[str]:
    """What may not hold the checkpoints of a run from ``step`` on: its folder's disk, hosts' memory. Collective."""
    found = write_on_first(output, lambda: _few(engine, recipe, output, step))
    return [*found, *(_crowded(engine) if recipe.checkpoint_async else ())]


def _few(engine: Engine, recipe: Recipe, output: Path, step: int) -> list[str]:
    kept = recipe.keep_checkpoints + 1  # the new one is whole before an old one is deleted
    left = kept if recipe.steps is None else -(-(recipe.steps - step) // recipe.checkpoint_every)
    more = max(1, min(left, kept - len(list(output.glob(f"global_step*/{MANIFEST}")))))
    need, free = disk(engine), shutil.disk_usage(output).free
    if free >= need * more:
        return []
    return [
        f"{more} more checkpoints of {need / 1e9:.3g} GB will lie in {output} at a time, and its disk has "
        f"{free / 1e9:.3g} GB free. A new one is whole before an old one is deleted: lower keep_checkpoints, or free "
        f"{(need * more - free) / 1e9:.3g} GB"
    ]


def _crowded(engine: Engine) -> list[str]:
    """A note for every host without the memory to write its ranks' files behind training."""
    found = RANKS.allgather((socket.gethostname(), memory(engine), free_memory()))
    lines = []
    for host in dict.fromkeys(host for host, *_ in found):
        need = sum(part for name, part, _ in found if name == host)
        free = min((left for name, _, left in found if name == host and left is not None), default=need)
        if free < need:
            lines.append(
                f"checkpoint_async takes {need / 1e9:.3g} GB of {host}'s memory while a checkpoint is written, and "
                f"{free / 1e9:.3g} GB are free: use more hosts, or leave it out"
            )
    return lines
