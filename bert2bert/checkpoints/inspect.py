"""What is in a checkpoint, any checkpoint, without reading its tensors; or, reading every byte of it, what is bad.

`inspect_text` gives the results as text for a terminal, their ``to_json`` as plain data. Refuses what `open_source`
refuses; `check`, a folder without a manifest, for there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.commit.pending import file_sizes
from bert2bert.checkpoints.facts import as_json
from bert2bert.checkpoints.manifest import MANIFEST, Digests, Grown, Trained, read_manifest
from bert2bert.checkpoints.open import locate, open_source
from bert2bert.checkpoints.source import Source
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.digest import FILE_DIGEST, file_digest

HYPER = ("lr", "weight_decay", "betas", "eps")
"""Hyper-parameters of a group that are shown."""
SIZES = {  # size -> config keys, of BERT and of GPT-2
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "n_inner"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}


@dataclass(frozen=True)
class Architecture:
    """The model by its Hugging Face config."""

    type: str | None  # its model_type
    classes: list[str] | None  # its architectures
    sizes: dict[str, Any]  # of `SIZES`; None: not in the config

    def to_json(self) -> dict[str, Any]:
        """As an object, the sizes beside the rest."""
        return {"type": self.type, "classes": self.classes, **self.sizes}


@dataclass(frozen=True)
class GroupFacts:
    """An optimizer group."""

    hyper: dict[str, Any]  # those of `HYPER` that it has
    tensors: int
    parameters: int  # elements of all its tensors
    step: list[int]  # Adam's, every value that occurs

    def to_json(self) -> dict[str, Any]:
        """As an object, the hyper-parameters beside the rest."""
        return {**self.hyper, "tensors": self.tensors, "parameters": self.parameters, "step": self.step}


@dataclass(frozen=True)
class TensorFacts:
    """A tensor."""

    name: str
    shape: list[int]
    dtype: str  # of the weights, as torch names it
    group: int | None  # index of its optimizer group
    step: int  # Adam's
    trainable: bool


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds."""

    path: str  # as it was given
    folder: str  # that holds the files
    tag: str | None
    format: str  # "zero", "universal" or "hub"
    stage: int | None
    world_size: int | None
    expert_parallel: int | None  # ranks that share the experts
    precision: str
    architecture: Architecture | None  # None: no config
    tensor_count: int
    parameters: int  # elements of all tensors
    bytes: int  # of all files
    files: int
    states: list[str]  # of a tensor that can be read, "fp32" first
    other_states: list[str]  # that the optimizer keeps besides and are not carried
    step: list[int]  # Adam's, every value that occurs; empty without Adam's moments
    counters: dict[str, int]
    groups: list[GroupFacts]
    lr_scheduler: dict[str, Any] | None
    loss_scale: float | None
    client_state: list[str]  # keys
    tied: dict[str, str]  # absent name -> name that is kept
    frozen: list[str]  # names of tensors that the optimizer does not own
    buffers: list[str]
    extras: list[str]  # names in the model's state that are neither parameter nor buffer
    unopened: list[str]  # classes named in the files that this program does not know
    unread: list[str]  # names of the model whose values the checkpoint does not hold
    kind: str | None  # of the manifest, as are the next three
    growth: Grown | None
    training: Trained | None
    versions: Mapping[str, Any] | None
    tensors: list[TensorFacts]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plain = ("architecture", "growth", "training")
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found |= {key: found[key].to_json() for key in plain if found[key] is not None}
        return {
            **found,
            "groups": [group.to_json() for group in self.groups],
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


def inspect(path: str | Path, tag: str | None = None) -> Inspection:
    """What the checkpoint at ``path`` holds; ``tag`` as in `open_source`."""
    source = open_source(path, tag)
    tensors = source.tensors.values()
    manifest = source.manifest
    return Inspection(
        path=str(source.path),
        folder=str(source.folder),
        tag=source.tag,
        format=source.format,
        stage=source.stage,
        world_size=source.world_size,
        expert_parallel=source.expert_parallel.size if source.expert_parallel else None,
        precision=source.precision,
        architecture=_architecture(source.config),
        tensor_count=len(tensors),
        parameters=sum(m.numel for m in tensors),
        bytes=sum(file.stat().st_size for file in source.files),
        files=len(source.files),
        states=list(source.states),
        other_states=list(source.other_states),
        step=sorted({source.step(m.name) for m in tensors if m.trainable}) if len(source.states) > 1 else [],
        counters=source.counters,
        groups=[_group(source, group) for group in source.groups],
        lr_scheduler=as_json(source.lr_scheduler),
        loss_scale=(source.loss_scaler or {}).get("cur_scale") if source.precision == "fp16" else None,
        client_state=sorted(map(str, source.client_state)),
        tied=source.aliases,
        frozen=[m.name for m in tensors if not m.trainable],
        buffers=sorted(source.buffers),
        extras=sorted(source.extras),
        unopened=source.unopened(),
        unread=list(source.unread),
        kind=manifest.kind if manifest else None,
        growth=manifest.growth if manifest else None,
        training=manifest.training if manifest else None,
        versions=manifest.versions if manifest else None,
        tensors=[
            TensorFacts(m.name, list(m.shape), m.dtype, m.group, source.step(m.name), m.trainable) for m in tensors
        ],
    )


def _architecture(config: dict[str, Any] | None) -> Architecture | None:
    if config is None:
        return None
    classes = config.get("architectures")
    if classes is not None:  # a list of names, if the config is sound
        classes = [str(name) for name in classes] if isinstance(classes, list) else [str(classes)]
    sizes = {size: next((config[k] for k in keys if config.get(k) is not None), None) for size, keys in SIZES.items()}
    return Architecture(config.get("model_type"), classes, sizes)


def _group(source: Source, group: dict[str, Any]) -> GroupFacts:
    names = group["names"]
    return GroupFacts(
        hyper={key: as_json(group[key]) for key in HYPER if key in group},
        tensors=len(names),
        parameters=sum(source.tensors[name].numel for name in names),
        step=sorted({source.step(name) for name in names}),
    )


@dataclass(frozen=True)
class Check:
    """How the files of a checkpoint compare with its manifest."""

    folder: str
    files: int  # that the manifest lists
    bytes: int  # of these
    digests: int  # of these that the manifest has a digest of
    bad: dict[str, str]  # name -> what is wrong with it
    unlisted: list[str]  # files in the folder that the manifest does not list

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


def check(path: str | Path, tag: str | None = None) -> Check:
    """Compare every file of a checkpoint of ours with its manifest: presence, size, and content where the manifest has
    digests (older training checkpoints have none: sizes alone). Streamed. Raises InvalidCheckpoint if there is no
    manifest to compare with.
    """
    folder, _ = locate(Path(path), tag)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InvalidCheckpoint(
            f"{folder}: has no {MANIFEST}, so there is nothing to compare its files with. Checkpoints that bert2bert "
            "writes have one; inspect without --check reads any."
        )
    digests = manifest.digests or Digests(FILE_DIGEST)
    if digests.kind != FILE_DIGEST:
        raise InvalidCheckpoint(f"{folder / MANIFEST}: digests of kind {digests.kind!r}; known: {FILE_DIGEST}")
    bad = {} if manifest.intact else {MANIFEST: "content differs"}
    for name, size in manifest.files.items():
        if problem := _problem(folder / name, size, digests.files.get(name)):
            bad[name] = problem
    return Check(
        folder=str(folder),
        files=len(manifest.files),
        bytes=sum(manifest.files.values()),
        digests=len(digests.files.keys() & manifest.files.keys()),
        bad=bad,
        unlisted=sorted(file_sizes(folder).keys() - manifest.files.keys()),
    )


def _problem(file: Path, size: int, digest: str | None) -> str | None:
    try:
        if not file.is_file():
            return "missing"
        if (found := file.stat().st_size) != size:
            return f"{found:,} bytes, should be {size:,}"
        return "content differs" if digest is not None and file_digest(file) != digest else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
