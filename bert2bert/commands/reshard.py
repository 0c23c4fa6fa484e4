"""The command ``reshard``: a checkpoint in another format, stage, world size or precision: a growth by identity.

Any model: tensors go by name, bit for bit, with what belongs to them (tied names, frozen ones, buffers, groups and
their hyper-parameters, steps, scheduler, loss scale, counters, client state), so no config and no table is needed;
a config is carried where there is one. What a format cannot hold is reported.

Refuses what readers and writers refuse; float64 and integer parameters, which the writers would round
(UnsupportedGrowth); a ``--source-config`` for a source that has its own (InvalidConfig).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from bert2bert.checkpoints import clients
from bert2bert.checkpoints.commit.pending import check_contents
from bert2bert.checkpoints.commit.source_guard import Watch
from bert2bert.checkpoints.expert_parallel.target import notes as expert_notes
from bert2bert.checkpoints.facts import versions
from bert2bert.checkpoints.hub.beside import all_beside
from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.manifest import Grown, Manifest, Resharded
from bert2bert.checkpoints.notes import (
    empty_groups,
    left,
    regrouped,
    rounding,
    second_names,
    unopened,
    untrained,
    valueless,
)
from bert2bert.checkpoints.of_ranks import first_ranks, of_ranks
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import Source
from bert2bert.checkpoints.spec import Content, known_layout, make_spec
from bert2bert.checkpoints.target import Target
from bert2bert.commands.writing import completed, write
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.source_model import read_config
from bert2bert.growth.target_names import Names
from bert2bert.ranks.comm import ALONE, Comm, together

if TYPE_CHECKING:
    import torch

PLAN = "identity"
_EXACT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # dtypes that go through float32 unchanged
_RANDOM = "bert2bert_rng_rank_*.pt"  # of a training run's ranks


def reshard(
    source: Path,
    folder: Path,
    target: Target,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    comm: Comm = ALONE,
    say: Callable[[str], None] = print,
    bar: bool = True,
) -> Path:
    """Write the checkpoint at ``source`` again and commit it; the folder written. tag: the source's.

    Every rank of ``comm`` calls this alike. Raises UserError of all kinds; what is finished then, the same call uses
    again.
    """

    def prepare() -> tuple[Source, Names, TargetSpec, Watch]:
        opened = _open(source, tag, source_config)
        names = Names.of(opened, target.format, opened.config)
        spec = completed(identity_spec(opened, names, target), opened, target, folder, comm)
        return opened, names, spec, Watch(opened)

    opened, names, spec, watch = together(comm, prepare)
    noted = [*notes(opened, names, spec, target), *expert_notes(spec)]
    if comm.rank == 0:
        say(_summary(opened, spec, target, [*noted, *clients.notes(opened, spec.beside, folder, target)]))

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return opened.read(names.stored[name], state, start, stop).float()

    was = opened.manifest or Manifest()
    manifest = Manifest(
        kind=was.kind or "growth",  # stays what it was, for a run that continues from it
        growth=_growth(was.growth, names),
        training=was.training,
        reshard=Resharded(watch.identity, PLAN, noted, versions()),
    )
    return write(
        folder, spec, read, target, watch, manifest=manifest, expected=_digests(opened, names, spec, target),
        comm=comm, say=say, bar="writing" if bar else None,
    )  # fmt: skip


def _growth(growth: Grown | None, names: Names) -> Grown | None:
    """The section ``growth`` of the source's manifest, with the target's names."""
    if growth is None or growth.factors is None:
        return growth
    new = {old: name for name, old in names.stored.items()}
    return replace(growth, factors=growth.factors.renamed(lambda old: new.get(old, old)))


def _digests(source: Source, names: Names, spec: TargetSpec, target: Target) -> dict[tuple[str, str], str]:
    """The digests that the source's manifest knows, of what source and target both hold as float32."""
    known = source.manifest.tensors if source.manifest else {}
    return {
        (name, state): digest
        for name, stored in names.stored.items()
        if source.tensors[stored].trainable and source.tensors[stored].dtype == "float32"
        and not (target.format == "hub" and spec.stored_dtype(name).itemsize < 4)
        for state, digest in (known[stored].digest.items() if stored in known else ())
    }  # fmt: skip


def _open(path: Path, tag: str | None, config: Path | None) -> Source:
    source = open_source(path, tag)
    if config is not None:
        if source.config:
            raise InvalidConfig(f"--source-config {config}: {path} carries a config of its own; leave it out")
        source.config = read_config(config)
    for meta in source.tensors.values():
        if meta.dtype not in _EXACT:
            frozen = not meta.trainable
            raise UnsupportedGrowth(
                f"{path}: '{meta.name}' is {meta.dtype}{', a parameter that the run froze' * frozen}, which a "
                "checkpoint of float32, bfloat16 or float16 cannot hold unchanged.\nConvert it first, or leave it out "
                f"of the checkpoint{' (save_checkpoint with exclude_frozen_parameters=True)' * frozen}."
            )
    return source


def identity_spec(source: Source, names: Names, target: Target) -> TargetSpec:
    """The target as the source is. Groups None or "source": the source's groups, their order, and the order in them."""
    stored = names.stored
    kept = target.groups in (None, "source") and bool(source.groups)
    known = known_layout(source, names.members)
    content = Content(
        shapes={name: source.tensors[old].shape for name, old in stored.items()},
        aliases={a: name for a, name in names.aliases.items() if a not in stored and name in stored},
        config=dict(names.config or source.config or {}),
        members=names.members,
        made_of={name: [old] for name, old in stored.items()},
        known=known,
        frozen=frozenset(name for name, old in stored.items() if not source.tensors[old].trainable),
        order=lambda _: [name for group in source.groups for name in group["names"]],
        dtypes={} if target.precision else {name: source.tensors[old].dtype for name, old in stored.items()},
    )
    spec = make_spec(source, content, replace(target, groups="source") if kept and target.format != "hub" else target)
    spec = replace(spec, buffers={n: buffer for n, buffer in source.buffers.items() if n not in names.left})
    if target.format == "hub":
        files = all_beside(source.folder) if source.format == "hub" else {}
    else:
        files = _random_states(source)  # however the target is cut: a run goes on with them on as many ranks as it had
        if kept:
            recorded = source.manifest.groups if source.manifest else ()
            parts = {tuple(group.names): group.part for group in recorded}
            groups = tuple(replace(group, part=parts.get(group.names, group.part)) for group in spec.groups)
            spec = replace(spec, groups=groups, group_layout=known or "source")
    return of_ranks(source, replace(spec, extra_files={**spec.extra_files, **files}), target)


def _random_states(source: Source) -> dict[str, bytes]:
    """Name -> content of the random states of a run's ranks."""
    files = sorted(source.folder.glob(_RANDOM))
    check_contents(source.folder, [file.name for file in files])
    return {file.name: file.read_bytes() for file in files}


def notes(source: Source, names: Names, spec: TargetSpec, target: Target) -> list[str]:
    """What the target does not hold, or holds otherwise, in sentences."""
    hub = target.format == "hub"
    found = _folder_notes(source, spec) if hub else []
    if source.format == "hub" and not hub:
        found.append("the source holds weights only: moments of zero, step 0, hyper-parameters of a fresh AdamW")
    found += [*unopened(source, target.format), *first_ranks(source, spec, target)]
    found += valueless(source.unread, loads=target.format != "zero" or target.stage == 3)
    found += [*second_names(source, spec), *untrained(source, spec, target.stage), *source.notes]
    origins = {name: [source.tensors[names.stored[name]].dtype] for name in spec.shapes}
    found += [*rounding(spec, target.format, origins), *_renamed(names)]
    if source.format == "hub":
        found += left(source, spec)
    if hub:
        return found
    found += regrouped(source, spec, {name: [names.stored[name]] for name in spec.shapes})
    found += empty_groups(source, spec)
    mixed = [group.part for group in spec.groups if len({source.step(names.stored[n]) for n in group.names}) > 1]
    if mixed and len(source.states) > 1:
        found.append(f"{', '.join(mixed)}: parameters with different Adam steps share a group, which has the largest")
    return found


def _folder_notes(source: Source, spec: TargetSpec) -> list[str]:
    """What a Hugging Face folder does not hold of a run, and how it holds the rest."""
    found = []
    if source.format != "hub":
        held = [*source.states[1:]]
        held += ["groups"] if source.groups else []
        held += ["learning-rate scheduler"] if source.lr_scheduler else []
        held += ["client state"] if spec.client_state else []
        held += source.extras
        held += ["random states"] if any(source.folder.glob(_RANDOM)) else []
        held += ["which parameters are frozen"] if not all(m.trainable for m in source.tensors.values()) else []
        found.append(f"a Hugging Face folder holds weights only; left out: {', '.join([*held, 'counters'])}")
    if not spec.config:
        found.append("the source has no config, so the folder has no config.json (--source-config FILE gives one)")
    if spec.aliases:
        found.append(f"tied tensors are stored once: {', '.join(f'{a} = {k}' for a, k in spec.aliases.items())}")
    return found


def _renamed(names: Names) -> list[str]:
    """Which tensors have other names in the target, or are not in it."""
    found = []
    if renamed := {name: old for name, old in names.stored.items() if name != old}:
        name, old = next(iter(renamed.items()))
        found.append(f"{len(renamed)} tensors get the names that transformers gives them, first {old}: {name}")
    found += names.notes
    if names.copies:
        copies = [f"{a} = {k}" for a, k in names.copies.items()]
        found.append(f"copies of tied tensors, stored once: {', '.join(copies)}")
    if names.left:
        found.append(f"left out, for transformers does not read them: {', '.join(names.left)}")
    return found


def _summary(source: Source, spec: TargetSpec, target: Target, noted: Iterable[str]) -> str:
    def shape(stage: int | None, world: int | None) -> str:
        return f", stage {stage}, world size {world}" if stage and world else ", stage 0" if stage == 0 else ""

    count = sum(prod(s) for s in spec.shapes.values())
    states = source.kept if len(spec.states) > 1 else spec.states
    step = f", step {source.counters['global_steps']}" if "global_steps" in source.counters else ""
    groups = f", {len(spec.groups)} optimizer groups" if target.format != "hub" else ""
    return "\n".join(
        [
            f"source   {source.path} ({source.format}{shape(source.stage, source.world_size)}, "
            f"{source.precision}{step})",
            f"target   {target.format}{shape(target.stage, target.world_size)}, {spec.precision}{groups}",
            f"size     {len(spec.shapes)} tensors, {count:,} parameters ({', '.join(states)})",
            *(f"note     {text}" for text in noted),
        ]
    )
