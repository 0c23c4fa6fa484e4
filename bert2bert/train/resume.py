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
from bert2bert.checkpoints.manifest import MANIFEST, GroupEntry, Grown, Manifest
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.files import torch_reader
from bert2bert.model.config import BertConfig
from bert2bert.ranks.comm import together
from bert2bert.ranks.distributed import RANKS
from bert2bert.recipe import Recipe
from bert2bert.train import partitions
from bert2bert.train.engine import GROUP_LAYOUT, Engine
from bert2bert.train.position import Progress, continued, start
from bert2bert.train.rng import seed_all, set_random_state
from bert2bert.train.save import random_file, random_ranks

BLOCK = 1 << 22  # elements read at a time
_HYPER = ("weight_decay", "betas", "eps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "tie_word_embeddings", "heads",
)  # fmt: skip


@dataclass(frozen=True)
class Resumed:
    """What a run continues from.

    ``kind``: "train", "growth" or "weights"; ``progress``: its position (step 0 but for "train"); ``growth``: that of
    the manifest, for a run from a grown checkpoint and its own later ones; ``notes``: what the user should be told.
    """

    folder: Path
    kind: str
    progress: Progress
    growth: Grown | None
    notes: tuple[str, ...]


def load(engine: Engine, path: Path, recipe: Recipe, data: Mapping[str, Any]) -> Resumed:
    """Load the checkpoint at ``path`` (a tag's folder, or the latest of a run's) into the engine. Collective.

    ``data``: {"digest", "tokenizer_digest"} of the bins the run will read. Raises InvalidCheckpoint or InvalidConfig,
    the same on every rank.
    """
    found = together(RANKS, lambda: _open_and_fill(engine, path, recipe, data))
    source, resumed = found
    partitions.publish(engine)
    _compare(engine, source)
    files = [MANIFEST, *file_sizes(source.folder)][engine.rank :: engine.world]
    together(RANKS, lambda: check_contents(source.folder, files))
    return resumed


def _open_and_fill(engine: Engine, path: Path, recipe: Recipe, data: Mapping[str, Any]) -> tuple[Source, Resumed]:
    source = open_source(path)
    manifest = source.manifest or Manifest()
    kind = "weights" if source.form == "hub" else str(manifest.kind)
    if source.form != "hub" and kind not in ("train", "growth"):
        config = "" if source.config else " --source-config CONFIG.json"
        raise InvalidCheckpoint(
            f"{source.folder}: a checkpoint of a DeepSpeed run that is not this project's: it has no manifest to check "
            "a load against. Rewrite it and resume from what is written:\n"
            f"  bert2bert reshard {shlex.quote(str(source.path))} TARGET{config}\n"
            "  --resume TARGET\n"
            "Weights, moments and Adam steps stay as they are; the recipe begins at its step 0, on its own data"
        )
    _check_model(source, recipe)
    source = _unwrapped(engine, source)
    notes: list[str] = []
    if kind == "train":
        if manifest.training is None:
            raise InvalidCheckpoint(
                f"{source.folder / MANIFEST}: of kind 'train', but without the entry 'training', which says where the "
                "run stood. Restore the file, or use another tag"
            )
        progress = continued(manifest.training, source.folder, recipe, data, notes)
    else:
        progress = start()
        _check_tokenizer(source, manifest.growth, data)
    _check_tensors(engine, source)
    _check_groups(engine, source)
    _fill(engine, source)
    _restore_rest(engine, source, kind, recipe, progress, notes)
    if kind == "growth":
        notes += _other_hyper(engine, manifest.groups)
    if kind == "train" and not manifest.digests:
        notes.append("its manifest has no digests of files, so only tensors are compared with it")
    if kind == "weights":
        notes.append("a Hugging Face folder holds weights only: Adam's moments start at zero")
    return source, Resumed(source.folder, kind, progress, manifest.growth, tuple(notes))


def _check_tokenizer(source: Source, growth: Grown | None, data: Mapping[str, Any]) -> None:
    """Rows of the embedding mean tokens: a grown model goes on with the tokenizer of its source, on any data."""
    told = growth.tokenizer_digest if growth else None
    if told is not None and told != data["tokenizer_digest"]:
        raise InvalidConfig(
            f"the tokenizer differs from that of the model that {source.folder} was grown from: digest "
            f"{data['tokenizer_digest']}, that model had {told}. Give bins made with its tokenizer (bert2bert prepare "
            "--tokenizer tokenizer.json of the source's run folder)"
        )


def _check_model(source: Source, recipe: Recipe) -> None:
    if source.config is None:
        raise InvalidCheckpoint(
            f"{source.folder}: no config says which model this is. Put the model's config.json into the folder"
        )
    theirs, ours = BertConfig.from_hf(source.config), BertConfig.from_hf(recipe.model)
    for key in _ARCHITECTURE:
        if getattr(theirs, key) != getattr(ours, key):
            raise InvalidConfig(
                f"the recipe's model is not the checkpoint's: {key} is {getattr(ours, key)!r} in the recipe, "
                f"{getattr(theirs, key)!r} in {source.folder}. Use the recipe of that model, or grow the checkpoint to "
                "the recipe's sizes first"
            )


def _unwrapped(engine: Engine, source: Source) -> Source:
    """The source with this model's names, where a wrapper in somebody's script put a prefix ('model.') before each.

    A view: the source stays as it was opened, and each tensor knows its name in the files.
    """
    anchor = engine.names[0]
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
        view.manifest = replace(manifest, tensors=tensors, groups=groups)
    return view


def _check_tensors(engine: Engine, source: Source) -> None:
    for name in engine.names:
        if name not in source.tensors:
            raise InvalidCheckpoint(
                f"{source.folder}: lacks the tensor {name}, which the model has. It is of another model, or incomplete"
            )
        found, wanted = source.tensors[name].shape, engine.shape(name)
        if tuple(found) != wanted:
            raise InvalidCheckpoint(f"{source.folder}: tensor {name} has shape {tuple(found)}, the model {wanted}")
    known = set(engine.names) | source.aliases.keys()
    if odd := [name for name in source.tensors if name not in known]:
        raise InvalidCheckpoint(
            f"{source.folder}: holds the tensor {odd[0]}, which the model does not have. It belongs to another model"
        )


def _check_groups(engine: Engine, source: Source) -> None:
    """Adam's states, one step in each group; in native files also the groups' names, order and hyper-parameters."""
    others = source.other_states or [key for kept in source.moments if kept not in (ADAM, {}) for key in kept.values()]
    if others:
        raise InvalidCheckpoint(
            f"{source.folder}: its optimizer keeps {', '.join(dict.fromkeys(others))}, and "
            "this trainer's AdamW cannot go on with that. Grow the weights alone (--format hub) and resume from them"
        )
    if frozen := [name for name in engine.names if source.form != "hub" and not source.tensors[name].trainable]:
        raise InvalidCheckpoint(
            f"{source.folder}: {len(frozen)} parameters, the first of them {frozen[0]}, were frozen and have no "
            "optimizer state, and this trainer trains all. Grow the weights alone (--format hub) and resume from them"
        )
    for group in engine.groups:
        counts = {source.step(name): name for name in group.names}
        if len(counts) > 1:
            (a, first), (b, second) = list(counts.items())[:2]
            raise InvalidCheckpoint(
                f"{source.folder}: {first} has Adam step {a}, {second} has {b}; this trainer steps both in one group "
                f"({group.part}). Rewrite the checkpoint with bert2bert grow"
            )
    manifest = source.manifest
    if manifest is None or manifest.group_layout != GROUP_LAYOUT or source.form != "zero":
        return
    _check_order(engine, source, "manifest", [group.names for group in manifest.groups])
    _check_order(engine, source, "shard files", [group["names"] for group in source.groups])
    for part, said, file in zip((g.part for g in engine.groups), manifest.groups, source.groups, strict=True):
        for key in _HYPER:
            if key in said.hyper and _plain(said.hyper[key]) != _plain(file.get(key)):
                raise InvalidCheckpoint(
                    f"{source.folder}: the optimizer group {part} has {key} {file.get(key)!r} in the shard files, "
                    f"{said.hyper[key]!r} in the manifest: they are of two checkpoints"
                )


def _other_hyper(engine: Engine, groups: Sequence[GroupEntry]) -> list[str]:
    """A sentence about each hyper-parameter that a grown checkpoint carries and the recipe sets otherwise."""
    ours = {
        name: live for live, g in zip(engine.optimizer.param_groups, engine.groups, strict=True) for name in g.names
    }
    found: dict[str, None] = {}
    for group in groups:
        live = ours[group.names[0]]
        for key in _HYPER:
            said, value = group.hyper.get(key), _plain(live[key])
            if said is not None and _plain(said) != value:
                found[f"{key} was {said} in the checkpoint; the recipe's {value} holds from here on"] = None
    return list(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_order(engine: Engine, source: Source, what: str, groups: Sequence[Sequence[str]]) -> None:
    for i, group in enumerate(engine.groups):
        names = tuple(groups[i]) if i < len(groups) else ()
        if names == group.names and len(groups) == len(engine.groups):
            continue
        odd = next((a for a, b in zip(group.names, names, strict=False) if a != b), group.names[0])
        raise InvalidCheckpoint(
            f"{source.folder}: optimizer group {i} ({group.part}) of the {what} does not hold the model's parameters "
            f"in the model's order; the first difference is at {odd}. Files of two checkpoints are mixed"
        )


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
    engine: Engine, source: Source, kind: str, recipe: Recipe, progress: Progress, notes: list[str]
) -> None:
    """Buffers, loss scale, counters, random states."""
    for name, buffer in engine.buffers().items():
        held = source.buffers.get(name)
        if held is None or held.shape != buffer.shape:
            raise InvalidCheckpoint(f"{source.folder}: lacks the buffer {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(held)
    if engine.precision == "fp16" and source.loss_scaler and source.precision == "fp16":
        engine.restore_loss_scale({k: source.loss_scaler[k] for k in _SCALER if k in source.loss_scaler})
    if source.precision != engine.precision and source.form == "zero":
        notes.append(f"saved in {source.precision}, continued in {engine.precision}: losses will differ a little")
    if kind != "train":
        return  # counters, random state and position are the new run's own
    engine.counters = source.counters
    path, ranks = source.folder / random_file(engine.rank), random_ranks(source.folder)
    same = ranks == engine.world and path.is_file()
    if same:
        check_contents(source.folder, [path.name])
    if same and set_random_state(torch_reader.load(path), engine.device):
        return
    seed_all(recipe.seed + 7_368_787 * (progress.step + 1), engine.rank)
    why = f"saved on {ranks} ranks, continued on {engine.world}" if ranks else "no random states were kept"
    why = "the kind of device changed" if same else why
    notes.append(f"{why}: the data go on in order, dropout draws anew")


def _compare(engine: Engine, source: Source) -> None:
    """The live engine against the manifest: Adam steps and the digest of every tensor's states. Collective."""
    manifest = source.manifest or Manifest()
    said = {name: group.step for group in manifest.groups for name in group.names}
    if set(partitions.MOMENTS) <= set(source.states):
        for group, step in zip(engine.groups, partitions.steps(engine), strict=True):
            if odd := [name for name in group.names if said.get(name, step) != step]:
                raise InvalidCheckpoint(
                    f"{source.folder}: {odd[0]} has Adam step {step} in the files, {said[odd[0]]} in the manifest: "
                    "they are of two checkpoints. Use another tag"
                )
    stored = getattr(torch, next(iter(source.tensors.values())).dtype) if source.form == "hub" else torch.float32
    live = partitions.digests(engine, stored)
    for name, entry in manifest.tensors.items():
        for state, told in entry.digest.items():
            if state in source.states and live[name][state] != told:
                raise InvalidCheckpoint(
                    f"{source.folder}: {state} of {name} has digest {live[name][state]} once loaded, the manifest says "
                    f"{told}: the file is damaged or was changed. Use another tag, or restore the file"
                )
