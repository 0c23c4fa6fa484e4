"""The command ``reshard``: a checkpoint in another form, stage, number of ranks or precision: a growth by the identity.

Any model: tensors go by name, bit for bit, with what belongs to them (tied names, frozen ones, buffers, groups and
their hyper-parameters, steps, scheduler, loss scale, counters, client state), so no config and no table is needed;
a config is carried where there is one. What a form cannot hold is said.

Refuses what readers and writers refuse; float64 and integer parameters, which the writers would round
(UnsupportedGrowth); a ``--source-config`` for a source that has its own (InvalidConfig).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.expert_targets import notes as expert_notes
from bert2bert.expert_targets import with_experts
from bert2bert.shards.commit import check_contents
from bert2bert.target_names import Names
from bert2bert.targets import (
    check_form,
    known_layout,
    left,
    make_spec,
    own_precision,
    progress,
    regrouped,
    rounding,
    tagged,
    unopened,
    versions,
)

if TYPE_CHECKING:
    import torch

    from bert2bert.shards.source import Source
    from bert2bert.shards.writing import TargetSpec

PLAN = "identity"
_EXACT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # dtypes that go through float32 unchanged
_RANDOM = "bert2bert_rng_rank_*.pt"  # of a training run's ranks


def reshard(
    source: Path,
    target: Path,
    *,
    form: str = "universal",
    stage: int | None = None,
    world_size: int | None = None,
    expert_parallel: int | None = None,
    target_tag: str | None = None,
    precision: str | None = None,
    layout: str | None = None,
    shard_size: str | None = None,
    source_config: Path | None = None,
    tag: str | None = None,
    comm: Any = None,
    say: Callable[[str], None] = print,
    bar: bool = True,
) -> Path:
    """Write the checkpoint at ``source`` anew and commit it; the folder written.

    Every rank of ``comm`` calls this alike. Raises UserError of all kinds; what is finished then, the same call uses
    again.
    """
    from bert2bert.shards import clients
    from bert2bert.shards.transfer import together, write_checkpoint
    from bert2bert.shards.watch import Watch
    from bert2bert.shards.writing import check_target

    largest = check_form(form, stage, world_size, layout, shard_size, expert_parallel)
    first = comm is None or comm.Get_rank() == 0

    def prepare() -> tuple[Source, Names, TargetSpec, Watch]:
        opened = _open(source, tag, source_config)
        names = Names.of(opened, form, opened.config)
        spec = identity_spec(
            opened, names, form=form, stage=stage, world_size=world_size, layout=layout, precision=precision
        )
        spec = with_experts(spec, opened, expert_parallel, form=form, stage=stage, world=world_size, layout=layout)
        spec = tagged(spec, target_tag, form)
        if first:
            check_target(target, spec, form)
        return opened, names, spec, Watch(opened)

    opened, names, spec, watch = together(comm, prepare)
    told = [*notes(opened, names, spec, form), *expert_notes(spec)]
    beside = clients.notes(opened, spec.beside, target, form, world_size)
    if first:
        say(_summary(opened, spec, form, stage, world_size, [*told, *beside]))

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return opened.read(names.stored[name], state, start, stop).float()

    about = {"source": watch.identity, "plan_digest": PLAN, "notes": told, "versions": versions()}
    was = opened.manifest or {}
    more = {
        "kind": was.get("kind", "growth"),  # of what it is, not of how it was written: a run goes on from it
        "growth": was.get("growth"),
        "training": was.get("training"),
        "reshard": about,
    }
    total = len(spec.states) * 4 * sum(prod(shape) for shape in spec.shapes.values())
    with progress(total, comm, "writing", bar) as done:
        folder = write_checkpoint(
            target, spec, read, form=form, stage=stage, world_size=world_size, manifest_growth=about,
            manifest_more=more, expected=_digests(opened, names, spec, form), comm=comm, progress=done.update,
            max_file_bytes=largest, watch=watch, say=say,
        )  # fmt: skip
    if first:
        say(f"written  {folder}")
    return folder


def _digests(source: Source, names: Names, spec: TargetSpec, form: str) -> dict[tuple[str, str], str]:
    """The digests that the source's manifest knows, of what source and target both hold as float32."""
    known = (source.manifest or {}).get("tensors", {})
    return {
        (name, state): digest
        for name, stored in names.stored.items()
        if source.tensors[stored].trainable and source.tensors[stored].dtype == "float32"
        and not (form == "hub" and spec.stored_dtype(name).itemsize < 4)
        for state, digest in known.get(stored, {}).get("digest", {}).items()
    }  # fmt: skip


def _open(path: Path, tag: str | None, config: Path | None) -> Source:
    from bert2bert.checkpoint_model import read_config
    from bert2bert.shards.source import open_source

    source = open_source(path, tag)
    if config is not None:
        if source.config:
            raise InvalidConfig(f"--source-config {config}: {path} carries a config of its own; leave it out")
        source.config = read_config(config)
    for meta in source.tensors.values():
        if meta.dtype not in _EXACT:
            raise UnsupportedGrowth(
                f"{path}: '{meta.name}' is {meta.dtype}, which a checkpoint of float32, bfloat16 or float16 cannot "
                "hold unchanged.\nConvert it first, or leave it out of the checkpoint."
            )
    return source


def identity_spec(
    source: Source,
    names: Names,
    *,
    form: str,
    stage: int | None,
    world_size: int | None,
    layout: str | None,
    precision: str | None,
) -> TargetSpec:
    """The target as the source is. layout: None or "source" keeps its groups, their order, and the order in them."""
    from bert2bert.shards.beside import all_beside

    stored = names.stored
    kept = layout in (None, "source") and bool(source.groups)
    known = known_layout(source, names.members)
    spec = make_spec(
        source,
        shapes={name: source.tensors[old].shape for name, old in stored.items()},
        members=names.members,
        known=known,
        aliases={a: name for a, name in names.aliases.items() if a not in stored and name in stored},
        config=dict(source.config or {}),
        made_of={name: [old] for name, old in stored.items()},
        akin={},
        reset=set(),
        order=lambda _: [name for group in source.groups for name in group["names"]],
        form=form,
        layout="source" if kept else layout,
        precision=precision or own_precision(source, form),
        dtypes={} if precision else {name: source.tensors[old].dtype for name, old in stored.items()},
    )
    spec = replace(spec, buffers={n: buffer for n, buffer in source.buffers.items() if n not in names.left})
    if kept and form != "hub":
        parts = {tuple(g["names"]): str(g["part"]) for g in (source.manifest or {}).get("groups", ())}
        groups = tuple(replace(group, part=parts.get(group.names, group.part)) for group in spec.groups)
        spec = replace(spec, groups=groups, group_layout=known or "source")
    if form == "hub" and source.form == "hub":
        spec = replace(spec, extra_files={**spec.extra_files, **all_beside(source.folder)})
    if form != "hub":  # however the target is cut: a run goes on with them on as many ranks as it had
        found = _random_states(source)
        check_contents(source.folder, [file.name for file in found])
        random = {file.name: file.read_bytes() for file in found}
        spec = replace(spec, extra_files={**spec.extra_files, **random})
    return spec


def _random_states(source: Source) -> list[Path]:
    return sorted(source.folder.glob(_RANDOM))


def notes(source: Source, names: Names, spec: TargetSpec, form: str) -> list[str]:
    """What the target does not hold, or holds otherwise, in sentences."""
    told = []
    if form == "hub" and source.form != "hub":
        held = [*source.states[1:], *(["groups"] if source.groups else [])]
        held += ["learning-rate scheduler"] if source.lr_scheduler else []
        held += ["client state"] if spec.client_state else []
        held += [*source.extras]
        held += ["random states"] if _random_states(source) else []
        held += ["which parameters are frozen"] if not all(m.trainable for m in source.tensors.values()) else []
        told.append(f"a Hugging Face folder holds weights only; left out: {', '.join([*held, 'counters'])}")
    if form == "hub" and not spec.config:
        told.append("the source has no config, so the folder has no config.json (--source-config FILE gives one)")
    if form == "hub" and spec.aliases:
        told.append(f"tied tensors are stored once: {', '.join(f'{a} = {k}' for a, k in spec.aliases.items())}")
    if source.form == "hub" and form != "hub":
        told.append("the source holds weights only: moments of zero, step 0, hyper-parameters of a fresh AdamW")
    told += unopened(source, form)
    if source.unread:
        told.append(f"not in the source, so not in the target: {', '.join(source.unread)}")
    told += source.notes
    told += rounding(spec, form, {name: [source.tensors[names.stored[name]].dtype] for name in spec.shapes})
    if renamed := {name: old for name, old in names.stored.items() if name != old}:
        name, old = next(iter(renamed.items()))
        told.append(f"{len(renamed)} tensors get the names that transformers gives them, first {old}: {name}")
    told += names.notes
    if names.left:
        told.append(f"left out, for no current model has them: {', '.join(names.left)}")
    if form == "hub" and source.form == "hub":
        told += left(source, spec)
    if form != "hub":
        told += regrouped(source, spec, {name: [names.stored[name]] for name in spec.shapes})
    mixed = [g.part for g in spec.groups if len({source.step(names.stored[n]) for n in g.names}) > 1 and form != "hub"]
    if mixed and len(source.states) > 1:
        told.append(f"{', '.join(mixed)}: parameters with different Adam steps share a group, which has the largest")
    return told


def _summary(source: Source, spec: TargetSpec, form: str, stage: int | None, world: int | None, told: list[str]) -> str:
    def shape(stage: int | None, world: int | None) -> str:
        return f", stage {stage}, world size {world}" if stage and world else ", stage 0" if stage == 0 else ""

    count = sum(prod(s) for s in spec.shapes.values())
    step = f", step {source.counters['global_steps']}" if "global_steps" in source.counters else ""
    return "\n".join(
        [
            f"source   {source.path} ({source.form}{shape(source.stage, source.world_size)}, {source.precision}{step})",
            f"target   {form}{shape(stage, world)}, {spec.precision}, {len(spec.groups)} optimizer groups"
            if form != "hub"
            else f"target   hub, {spec.precision}",
            f"size     {len(spec.shapes)} tensors, {count:,} parameters ({', '.join(spec.states)})",
            *(f"note     {text}" for text in told),
        ]
    )
