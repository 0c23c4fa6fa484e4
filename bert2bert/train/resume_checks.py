"""Whether a checkpoint is of a run's model, and whether it was loaded as it was written. See `resume`.

Every check raises InvalidConfig or InvalidCheckpoint, naming what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from bert2bert.checkpoints.groups import Group, refines
from bert2bert.checkpoints.manifest import GroupEntry, Manifest
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.model.registry import class_of, typed
from bert2bert.recipe import Recipe
from bert2bert.tables import table_for
from bert2bert.train import partitions
from bert2bert.train.engine import GROUP_LAYOUT, Engine

_HYPER = ("weight_decay", "betas", "eps")


def tokenizer_of(manifest: Manifest) -> str | None:
    """Digest of the tokenizer that a checkpoint's model was trained with; None where it is not recorded."""
    if manifest.training and manifest.training.data:
        return manifest.training.data.get("tokenizer_digest")
    return manifest.growth.tokenizer_digest if manifest.growth else None


def check_tokenizer(source: Source, manifest: Manifest, data: Mapping[str, Any]) -> None:
    """Rows of the embedding mean tokens: a model goes on with its tokenizer, on any data."""
    recorded = tokenizer_of(manifest)
    if recorded is not None and recorded != data["tokenizer_digest"]:
        raise InvalidConfig(
            f"the tokenizer differs from that of the model that {source.folder} was grown from: digest "
            f"{data['tokenizer_digest']}, that model had {recorded}. Give bins made with its tokenizer (bert2bert "
            "prepare --tokenizer tokenizer.json of the source's run folder)"
        )


def check_model(source: Source, recipe: Recipe) -> None:
    """The same architecture, class, sizes and settings, as far as these say what the model computes."""
    if source.config is None:
        raise InvalidCheckpoint(
            f"{source.folder}: no config says which model this is. Put the model's config.json into the folder"
        )
    theirs, ours = map(typed, (source.config, recipe.model or {}))
    found, about = theirs, {"model_type": ours["model_type"]}
    if theirs["model_type"] == ours["model_type"]:
        found, about = _described(theirs), _described(ours)
    for key, value in about.items():
        if found[key] != value:
            raise InvalidConfig(
                f"the recipe's model is not the checkpoint's: {key} is {ours.get(key, value)!r} in the recipe, "
                f"{theirs.get(key, found[key])!r} in {source.folder}. Use the recipe of that "
                "model, or grow the checkpoint to the recipe's sizes first"
            )


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Config key -> value, of all that decides what a model computes."""
    table = table_for(config)
    sizes = table.axis_sizes(config)
    about: dict[str, Any] = {}
    for axis in table.sizes.axes:
        if axis != "labels":
            about.setdefault(table.key(axis), sizes[axis])
    return {**about, **table.settled(config), "heads": sorted(table.names.classes[class_of(config)])}


def check_tensors(engine: Engine, source: Source) -> None:
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


def check_groups(engine: Engine, source: Source) -> None:
    """Adam's states, one step in each group; in native files also the groups' names, order and hyper-parameters, which
    are the manifest's. The engine's groups may be others, as factors split them: tensors are loaded by name."""
    others = source.other_states or [key for kept in source.moments if kept not in (ADAM, {}) for key in kept.values()]
    if others:
        raise InvalidCheckpoint(
            f"{source.folder}: its optimizer keeps {', '.join(dict.fromkeys(others))}, and "
            "this trainer's AdamW cannot go on with that. Grow the weights alone (--format hub) and resume from them"
        )
    if frozen := [name for name in engine.names if source.format != "hub" and not source.tensors[name].trainable]:
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
    if manifest is None or manifest.group_layout != GROUP_LAYOUT or source.format != "zero":
        return
    _check_names(source, manifest.groups)
    of = {name: group for group in manifest.groups for name in group.names}
    for recorded, file in ((of[group["names"][0]], group) for group in source.groups):
        for key in _HYPER:
            if key in recorded.hyper and _plain(recorded.hyper[key]) != _plain(file.get(key)):
                raise InvalidCheckpoint(
                    f"{source.folder}: an optimizer group of {recorded.part} has {key} {file.get(key)!r} in the shard "
                    f"files, {recorded.hyper[key]!r} in the manifest: they are of two checkpoints"
                )


def other_hyper(engine: Engine, groups: Sequence[GroupEntry]) -> list[str]:
    """A sentence about each hyper-parameter that a grown checkpoint carries and the recipe sets otherwise."""
    ours = {name: live for live, g in zip(engine.hyper, engine.groups, strict=True) for name in g.names}
    found: dict[str, None] = {}
    for group in groups:
        live = ours[group.names[0]]
        for key in _HYPER:
            recorded, value = group.hyper.get(key), _plain(live[key])
            if recorded is not None and _plain(recorded) != value:
                found[f"{key} was {recorded} in the checkpoint; the recipe's {value} holds from here on"] = None
    return list(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_names(source: Source, groups: Sequence[GroupEntry]) -> None:
    """The files' groups hold the same parameters as the manifest's, in the same order. Where ranks share experts, these
    were groups of their own: put back, they stand in one of those that their layer has."""
    ours, found = [list(group.names) for group in groups], [list(group["names"]) for group in source.groups]
    if source.expert_parallel:
        whole: dict[tuple[str, bool], tuple[str, ...]] = {}
        for group in groups:
            whole[group.part, group.decay] = (*whole.get((group.part, group.decay), ()), *group.names)
        same, where = refines(found, [Group(*key, names) for key, names in whole.items()]), ""
    else:
        none: list[str] = []
        pairs = zip_longest(ours, found, fillvalue=none)
        odd = next((a or b for left, right in pairs for a, b in zip_longest(left, right) if a != b), None)
        same, where = odd is None, f", in the same order; the first difference is at {odd}"
    if not same:
        raise InvalidCheckpoint(
            f"{source.folder}: the optimizer groups do not hold the same parameters in the manifest and in the shard "
            f"files{where}. Files of two checkpoints are mixed"
        )


def compare(engine: Engine, source: Source) -> None:
    """The live engine against the manifest: Adam steps and the digest of every tensor's states. Collective."""
    manifest = source.manifest or Manifest()
    recorded = {name: group.step for group in manifest.groups for name in group.names}
    if set(partitions.MOMENTS) <= set(source.states):
        for group, step in zip(engine.groups, partitions.steps(engine), strict=True):
            if odd := [name for name in group.names if recorded.get(name, step) != step]:
                raise InvalidCheckpoint(
                    f"{source.folder}: {odd[0]} has Adam step {step} in the files, {recorded[odd[0]]} in the manifest: "
                    "they are of two checkpoints. Use another tag"
                )
    stored = getattr(torch, next(iter(source.tensors.values())).dtype) if source.format == "hub" else torch.float32
    live = partitions.digests(engine, stored)
    for name, entry in manifest.tensors.items():
        for state, digest in entry.digest.items():
            if state in source.states and live[name][state] != digest:
                raise InvalidCheckpoint(
                    f"{source.folder}: {state} of {name} has digest {live[name][state]} once loaded, the manifest says "
                    f"{digest}: the file is damaged or was changed. Use another tag, or restore the file"
                )
