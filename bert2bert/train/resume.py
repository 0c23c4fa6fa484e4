"""Continue from a checkpoint: a run of this project, exactly; a grown one, from its first phase; a Hugging Face folder,
its weights alone. Any ZeRO stage, world size and precision, whatever the checkpoint was written with.

DeepSpeed's own loaders are not used. They unpickle blindly, take learning rate, decay and clipping from the file, check
neither names nor order nor sizes, forget frozen parameters and buffers, and share one step counter between all ZeRO-3
sub-groups. Here every rank reads the elements that it holds, by name, through the safe memory-mapped readers of
bert2bert.checkpoints; hyper-parameters stay the recipe's; and afterwards the live engine is compared with the manifest:
groups, names, order, shapes, steps, and the digest of every tensor's weight and moments; and every file's content with
its digest there, for what is no tensor: random states, counters, loss scale, the position in the data.

Refuses: another model, tokenizer, data, seed or row length than the checkpoint's run had (InvalidConfig); a checkpoint
of anyone's DeepSpeed run that has no manifest, and any that fails a comparison (InvalidCheckpoint).
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.commit.pending import check_contents, file_sizes
from bert2bert.checkpoints.manifest import MANIFEST, Grown, Manifest, Trained
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader
from bert2bert.ranks.comm import together
from bert2bert.ranks.distributed import RANKS
from bert2bert.recipe import Recipe
from bert2bert.train import partitions
from bert2bert.train.engine import Engine
from bert2bert.train.position import NEVER, Position, continued, grows_next, same_phases
from bert2bert.train.resume_checks import (
    check_groups,
    check_model,
    check_tensors,
    check_tokenizer,
    compare,
    other_hyper,
    tokenizer_of,
)
from bert2bert.train.rng import seed_all, set_random_state
from bert2bert.train.save import random_file, random_ranks

BLOCK = 1 << 22  # elements read at a time
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, eq=False)
class Found:
    """A checkpoint that a run continues from, opened and compared with the recipe, not yet loaded.

    ``kind``: "train", "growth" or "weights"; ``position``: where the run stands with it; ``growth``: that of the
    manifest, for a run from a grown checkpoint and its own later ones; ``notes``: for the user.
    """

    source: Source
    kind: str
    position: Position
    growth: Grown | None
    notes: list[str]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.source.folder

    def of(self, names: Sequence[str]) -> Found:
        """The same by the names of the model that it is to be loaded into, given in the model's order."""
        source = _unwrapped(names, self.source)
        growth = self.growth if source is self.source or source.manifest is None else source.manifest.growth
        return replace(self, source=source, growth=growth)


def find(path: Path, recipe: Recipe, data: Mapping[str, Any], own: bool) -> Found:
    """Open the checkpoint at ``path`` (a tag's folder, or the latest of a run's). Every rank calls it.

    ``data``: {"digest", "tokenizer_digest"} of the bins the run will read; ``own``: whether it is of the run's own
    folder. A run's checkpoint is where that run goes on, unless the recipe is another's whose first phase begins with a
    growth: then it is what grows. Raises InvalidCheckpoint or InvalidConfig, the same on every rank.
    """
    return together(RANKS, lambda: _find(path, recipe, data, own))


def _find(path: Path, recipe: Recipe, data: Mapping[str, Any], own: bool) -> Found:
    source = open_source(path)
    manifest = source.manifest or Manifest()
    kind = "weights" if source.format == "hub" else str(manifest.kind)
    notes: list[str] = []
    begins = recipe.begins_with_growth
    if source.format != "hub" and kind not in ("train", "growth") and not begins:
        config = "" if source.config else " --source-config CONFIG.json"
        raise InvalidCheckpoint(
            f"{source.folder}: a checkpoint of a DeepSpeed run that is not this project's: it has no manifest to check "
            "a load against. Rewrite it and resume from what is written:\n"
            f"  bert2bert reshard {shlex.quote(str(source.path))} TARGET{config}\n"
            "  --resume TARGET\n"
            "Weights, moments and Adam steps stay as they are; the recipe begins at its step 0, on its own data"
        )
    if kind == "train":
        if manifest.training is None:
            raise InvalidCheckpoint(
                f"{source.folder / MANIFEST}: of kind 'train', but without the entry 'training', which says where the "
                "run stood. Restore the file, or use another tag"
            )
        if own or not begins or same_phases(manifest.training, recipe):
            position = continued(manifest.training, source.folder, recipe, data, notes)
            return Found(source, kind, position, manifest.growth, notes)
    check_tokenizer(source, manifest, data)
    growth = manifest.growth
    if growth is not None and growth.source_training is not None:
        training = Trained.from_json(growth.source_training)
        if grows_next(training, recipe):
            position = continued(training, source.folder, recipe, data, notes).settled(recipe, NEVER)
            return Found(source, kind, replace(position, growths=position.growths + 1), growth, notes)
    if tokenizer_of(manifest) is None:
        notes.append(
            "which tokenizer the model was trained with is not recorded, so that of the bins is not compared with "
            "it: make them with bert2bert prepare --tokenizer FOLDER_OF_THE_MODEL"
        )
    return Found(source, kind, Position(), growth, notes)


def load(engine: Engine, found: Found, recipe: Recipe, position: Position) -> list[str]:
    """Load a checkpoint, by the model's names (`Found.of`), into its engine; notes for the user. Collective.

    ``recipe``: with the model, and what else the phase has (`Recipe.at`); ``position``: where the run stands. Raises
    InvalidCheckpoint or InvalidConfig, the same on every rank.
    """
    source, notes = found.source, together(RANKS, lambda: _fill_all(engine, found, recipe, position))
    partitions.publish(engine)
    compare(engine, source)
    files = [MANIFEST, *file_sizes(source.folder)][engine.rank :: engine.world]
    together(RANKS, lambda: check_contents(source.folder, files))
    return notes


def _fill_all(engine: Engine, found: Found, recipe: Recipe, position: Position) -> list[str]:
    source = found.source
    check_model(source, recipe)
    check_tensors(engine, source)
    check_groups(engine, source)
    _fill(engine, source)
    manifest = source.manifest or Manifest()
    engine.followed = manifest.training.followed if manifest.training else float(found.kind == "growth")
    notes: list[str] = []
    _restore_rest(engine, source, found.kind, recipe, position, notes)
    trained = manifest.growth is not None and manifest.growth.source.get("format") != "hub"
    if found.kind == "growth" and trained:  # else its groups have an optimizer's default values, and nobody's
        notes += other_hyper(engine, manifest.groups)
    if found.kind == "train" and not manifest.digests:
        notes.append("its manifest has no digests of files, so only tensors are compared with it")
    if found.kind == "weights":
        notes.append("a Hugging Face folder holds weights only: Adam's moments start at zero")
    return notes


def _unwrapped(names: Sequence[str], source: Source) -> Source:
    """The source with this model's names, where a wrapper in somebody's script put a prefix ('model.') before each.

    A view: the source stays as it was opened, and each tensor knows its name in the files.
    """
    anchor = names[0]
    before = [name.removesuffix(anchor) for name in source.tensors if name.endswith("." + anchor)]
    if anchor in source.tensors or len(before) != 1:
        return source

    def bare(name: str) -> str:
        return name.removeprefix(before[0])

    view = copy.copy(source)
    view.tensors = {bare(name): meta for name, meta in source.tensors.items()}
    view.buffers = {bare(name): buffer for name, buffer in source.buffers.items()}
    view.aliases = {bare(absent): bare(kept) for absent, kept in source.aliases.items()}
    view.groups = [{**group, "names": [bare(name) for name in group["names"]]} for group in source.groups]
    if manifest := source.manifest:
        tensors = {bare(name): entry for name, entry in manifest.tensors.items()}
        groups = [replace(group, names=[bare(name) for name in group.names]) for group in manifest.groups]
        growth = manifest.growth
        if growth is not None and growth.factors is not None:
            growth = replace(growth, factors=growth.factors.renamed(bare))
        view.manifest = replace(manifest, tensors=tensors, groups=groups, growth=growth)
    return view


def _fill(engine: Engine, source: Source) -> None:
    """Copy this rank's elements of every tensor's states from the checkpoint."""
    has_moments = set(partitions.MOMENTS) <= set(source.states)
    counts = [source.step(group.names[0]) if has_moments else 0 for group in engine.groups]
    moments = {
        master: {state: torch.zeros_like(master.detach()) for state in partitions.MOMENTS}
        for g, master in partitions.masters(engine)
        if counts[g]
    }
    for fragment in partitions.fragments(engine):
        _copy(source, engine, fragment, "fp32", fragment.of(fragment.master))
        for state, flat in moments.get(fragment.master, {}).items():
            _copy(source, engine, fragment, state, fragment.of(flat))
    partitions.set_moments(engine, moments, counts)


def _copy(source: Source, engine: Engine, fragment: partitions.Fragment, state: str, into: torch.Tensor) -> None:
    shape = engine.shape(fragment.name)
    width = int(torch.Size(shape[1:]).numel())
    last = -(-fragment.stop // width)
    for row in range(fragment.start // width, last, step := max(1, BLOCK // width)):
        end = min(row + step, last)
        low, high = max(row * width, fragment.start), min(end * width, fragment.stop)
        block = source.read(fragment.name, state, row, end).reshape(-1)[low - row * width : high - row * width]
        into[low - fragment.start : high - fragment.start].copy_(block)


def _restore_rest(
    engine: Engine, source: Source, kind: str, recipe: Recipe, position: Position, notes: list[str]
) -> None:
    """Buffers, loss scale, counters, random states."""
    for name, buffer in engine.buffers().items():
        held = source.buffers.get(name)
        if held is None or held.shape != buffer.shape:
            raise InvalidCheckpoint(f"{source.folder}: lacks the buffer {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(held)
    if engine.precision == "fp16" and source.loss_scaler and source.precision == "fp16":
        engine.restore_loss_scale({k: source.loss_scaler[k] for k in _SCALER if k in source.loss_scaler})
    if source.precision != engine.precision and source.format == "zero":
        notes.append(f"saved in {source.precision}, continued in {engine.precision}: losses will differ a little")
    if kind != "train" and not position.step:
        return  # counters, random state and position are the new run's own
    engine.counters = source.counters
    if kind != "train":
        seed_all(_later(recipe, position), engine.rank)  # the model is another than when the states were kept
        return
    path, ranks = source.folder / random_file(engine.rank), random_ranks(source.folder)
    same = ranks == engine.world and path.is_file()
    if same:
        check_contents(source.folder, [path.name])
    if same and set_random_state(torch_reader.load(path), engine.device):
        return
    seed_all(_later(recipe, position), engine.rank)
    why = f"saved on {ranks} ranks, continued on {engine.world}" if ranks else "no random states were kept"
    why = "the kind of device changed" if same else why
    notes.append(f"{why}: the data go on in order, dropout masks are drawn from a new seed")


def _later(recipe: Recipe, position: Position) -> int:
    """A seed for random states in the middle of a run."""
    return recipe.seed + 7_368_787 * (position.step + 1)
