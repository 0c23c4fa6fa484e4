"""Write a training checkpoint: DeepSpeed's own shards, every rank's random state, and a manifest to check them against.

Order: shards and random states, each file digested by the rank that wrote it and synced to the disk; then the manifest
(names, order, shapes, digests of tensors and of files, steps, position); then, atomically, `latest`. DeepSpeed itself
writes `latest` before the last rank has finished, so a killed rank would leave a run that cannot be resumed; here a
kill at any moment leaves the older checkpoint in force.

Refuses a disk without room for the checkpoint before anything is written, and a folder that not all ranks see. Deletes
only complete and abandoned tags of this run folder, never the newest complete one, and nothing behind a link.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.commit.pending import file_sizes, set_latest
from bert2bert.checkpoints.facts import versions
from bert2bert.checkpoints.manifest import (
    MANIFEST,
    Digests,
    GroupEntry,
    Grown,
    Manifest,
    TensorEntry,
    read_manifest,
    write_manifest,
)
from bert2bert.errors import InvalidCheckpoint, UserError
from bert2bert.files.digest import FILE_DIGEST, TENSOR_DIGEST
from bert2bert.files.disk import fsync_tree, replace
from bert2bert.ranks import heartbeat
from bert2bert.ranks.comm import gather
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.train import partitions
from bert2bert.train.engine import GROUP_LAYOUT, Engine
from bert2bert.train.position import Position
from bert2bert.train.rng import random_state
from bert2bert.train.room import check_disk
from bert2bert.train.writing import Files

UNFINISHED = "bert2bert.unfinished"
"""A file that lies in a tag's folder while it is written or deleted."""

HYPER = ("lr", "weight_decay", "betas", "eps")
_TAG = re.compile(r"global_step(\d+)")
_OF_RANK = re.compile(r"(?:zero_pp_rank|bert2bert_rng_rank)_(\d+)")


def tag_of(step: int) -> str:
    """The tag of the checkpoint after a step."""
    return f"global_step{step}"


def random_file(rank: int) -> str:
    """Name, inside a tag's folder, of a rank's random state."""
    return f"bert2bert_rng_rank_{rank:05d}.pt"


def random_ranks(folder: Path) -> int:
    """How many ranks the run had whose random states lie in a tag's folder: it may have been resharded since."""
    return sum(1 for _ in folder.glob("bert2bert_rng_rank_*.pt"))


class Saving:
    """A checkpoint under way: begun in a step, its files written at once or behind training, then committed.

    ``position``: where the run stood; ``folder``: where it is written.
    """

    def __init__(
        self,
        engine: Engine,
        root: Path,
        position: Position,
        *,
        model: Mapping[str, Any],
        aliases: Mapping[str, str],
        recipe: Mapping[str, Any],
        data: Mapping[str, Any],
        growth: Grown | None,
        keep: int,
        check: Callable[[], None],
        needed: Collection[int] = (),
        behind: bool = False,
    ) -> None:
        """Take down all that the checkpoint says, and begin to write it. Collective.

        ``model``: the Hugging Face config; ``data``: digests of tokens and tokenizer; ``growth``: the growth that the
        run came from, handed on; ``keep``: tags to keep; ``needed``: steps whose tags stay, too; ``check``: raises, on
        rank 0, if the folder is no longer this run's; ``behind``: whether files are written while training goes on.
        Raises UserError when the disk has no room or cannot be written.
        """
        tag = tag_of(position.step)
        self.root, self.folder, self.position = root, root / tag, position
        self.keep, self.check, self.needed = keep, check, needed
        write_on_first(root, check, lambda: _make_room(engine, root, self.folder))
        engine.thaw()
        self.files = Files(self.folder, behind)
        engine.save(root, tag, self.files.add)
        self.files.add(random_state(engine.device), self.folder / random_file(engine.rank))
        self.files.start()
        digests = partitions.digests(engine)
        steps = partitions.steps(engine)
        self.manifest = Manifest(
            kind="train",
            tag=tag,
            format="zero",
            stage=engine.stage,
            world_size=engine.world,
            precision=engine.precision,
            expert_parallel=engine.experts,
            group_layout=GROUP_LAYOUT,
            model=dict(model),
            aliases=dict(aliases),
            groups=[
                GroupEntry(group.part, group.decay, group.names, {key: hyper[key] for key in HYPER}, step)
                for group, hyper, step in zip(engine.groups, engine.hyper, steps, strict=True)
            ],
            tensors={name: TensorEntry(engine.shape(name), digests[name]) for name in engine.names},
            counters=engine.counters,
            versions=versions("deepspeed"),
            growth=growth,
            training=dataclasses.replace(position.recorded(recipe, data), followed=engine.followed),
        )

    @property
    def written(self) -> bool:
        """Whether this rank's files are written; when those of all ranks are, `commit` waits for none."""
        return self.files.written

    def commit(self) -> Path:
        """Make it the run's latest checkpoint, once every rank's files are there; its folder. Collective.

        Raises, on all ranks, what went wrong on any.
        """
        parts = gather(RANKS, self.files.finish)
        contents = {name: content for part in parts for name, content in part.items()}
        digests = Digests(FILE_DIGEST, TENSOR_DIGEST, dict(sorted(contents.items())))
        manifest = dataclasses.replace(self.manifest, digests=digests)
        acts = (heartbeat.check, self.check)
        write_on_first(
            self.root, *acts, lambda: _commit(self.root, self.folder, manifest, contents, self.keep, self.needed)
        )
        return self.folder

    def give_up(self) -> None:
        """Leave it unfinished, after an error: the older checkpoint stays in force."""
        self.files.give_up()


def save(engine: Engine, root: Path, position: Position, **about: Any) -> Path:
    """Write ``root/global_step<step>`` and make it the latest; returns its folder. Collective.

    ``about``: see `Saving`. Raises UserError when the disk has no room or cannot be written.
    """
    return Saving(engine, root, position, **about).commit()


def _make_room(engine: Engine, root: Path, folder: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():  # what it leads to is not this run's to delete
        _withdraw(root, folder)
        folder.unlink()
    elif folder.exists():  # a save that was killed, or a timeline that was abandoned: nothing of it may survive
        if _kind(folder) not in (None, "train"):
            raise UserError(
                f"{folder} exists and is no checkpoint of this run. Move it away, or choose another --output"
            )
        _withdraw(root, folder)
        _delete(folder)
    for script in root.glob("zero_to_*.py"):  # DeepSpeed copies them there
        if script.is_symlink():
            script.unlink()
    check_disk(engine, root, folder)
    folder.mkdir()
    (folder / UNFINISHED).touch()


def _withdraw(root: Path, folder: Path) -> None:
    """Before a tag is written again: if `latest` names it, let it name the newest whole one below instead."""
    latest = root / "latest"
    if latest.is_symlink() and latest.is_dir():
        named = os.path.basename(os.readlink(latest))
    else:
        named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if named != folder.name:
        return
    if newest := whole(root, _step_of(folder.name)):
        set_latest(root, newest.name)
    else:
        latest.unlink()


def whole(root: Path, below: int | None = None) -> Path | None:
    """The newest whole training checkpoint of a run folder, if any (``below``: of a smaller step)."""
    older = (folder for step, folder in tags(root) if below is None or step < below)
    return next((folder for folder in older if _kind(folder) == "train"), None)


def tags(root: Path) -> list[tuple[int, Path]]:
    """(Step, path) of whatever in a run folder is named as the checkpoint after a step; the last step first."""
    found = ((_step_of(path.name), path) for path in root.iterdir())
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def _writer(name: str) -> int:
    """The rank that writes a file: the one in its name; what DeepSpeed writes once, rank 0."""
    found = _OF_RANK.search(name)
    return int(found[1]) if found else 0


def _commit(
    root: Path, folder: Path, manifest: Manifest, contents: Iterable[str], keep: int, needed: Collection[int] = ()
) -> None:
    """Check that all ranks' files are there, and make the folder the run's latest checkpoint."""
    world = manifest.world_size or 0
    wanted = [*map(random_file, range(world)), *contents]
    if absent := sorted({_writer(name) for name in wanted if not (folder / name).is_file()}):
        raise UserError(
            f"checkpoint {folder} lacks the files of {len(absent)} of {world} ranks, the first of them {absent[0]}: "
            "their hosts see another folder of that name. Let --output lie on a file system that all hosts share"
        )
    fsync_tree(folder)
    files = {name: size for name, size in file_sizes(folder).items() if name != UNFINISHED}
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    (folder / UNFINISHED).unlink()  # after the manifest: a kill must leave one mark at least, else it looks foreign
    set_latest(root, folder.name)
    prune(root, folder.name, keep, needed)


def prune(root: Path, newest: str, keep: int, needed: Collection[int] = ()) -> None:
    """Delete this run's training checkpoints older than the last ``keep`` up to ``newest``, except those of the steps
    ``needed``, and older unfinished ones.

    Tags past ``newest`` (of a run that was resumed from an older tag by hand), growths, foreign folders and links stay.
    """
    limit = _step_of(newest)
    older = []
    for step, folder in tags(root):
        if limit is None or step >= limit or folder.is_symlink() or not folder.is_dir():
            continue
        kind = _kind(folder)
        if kind is None:
            _delete(folder)
        elif kind == "train" and step not in needed:
            older.append(folder)
    for folder in older[max(keep - 1, 0) :]:
        _delete(folder)


def _delete(folder: Path) -> None:
    replace(folder / UNFINISHED, "")
    (folder / MANIFEST).unlink(missing_ok=True)  # first: a kill in between must not leave something that looks whole
    for entry in folder.iterdir():  # the mark last: a kill in between must not leave something that looks foreign
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != UNFINISHED:
            entry.unlink()
    (folder / UNFINISHED).unlink()
    folder.rmdir()


def _step_of(name: str) -> int | None:
    found = _TAG.fullmatch(name)
    return int(found[1]) if found else None


def _kind(folder: Path) -> str | None:
    """The manifest's kind; None: left by a killed save or deletion; 'foreign': not written by this program."""
    try:
        manifest = read_manifest(folder)
    except (InvalidCheckpoint, OSError):
        return "foreign"
    if manifest is not None:
        return str(manifest.kind)
    empty = folder.is_dir() and not any(folder.iterdir())  # just made, or all but deleted
    return None if empty or (folder / UNFINISHED).exists() else "foreign"
