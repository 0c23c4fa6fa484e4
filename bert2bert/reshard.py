"""The command ``reshard``: a checkpoint in another form, stage, number of ranks or precision: a growth by the identity.

Any model: tensors go by name, bit for bit, with what belongs to them (tied names, frozen ones, buffers, groups and
their hyper-parameters, steps, scheduler, loss scale, counters, client state), so no config and no table is needed;
a config is carried where there is one. What a form cannot hold is said.

Refuses what readers and writers refuse; float64 and integer parameters, which the writers would round
(UnsupportedGrowth); a ``--source-config`` for a source that has its own (InvalidConfig).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.errors import InvalidConfig, UnsupportedGrowth, UserError
from bert2bert.expert_targets import notes as expert_notes
from bert2bert.expert_targets import with_experts
from bert2bert.groups import Member, by_name
from bert2bert.targets import check_form, known_layout, make_spec, progress, versions

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
    from bert2bert.shards.transfer import together, write_checkpoint
    from bert2bert.shards.watch import Watch
    from bert2bert.shards.writing import check_target

    largest = check_form(form, stage, world_size, layout, shard_size, expert_parallel)
    first = comm is None or comm.Get_rank() == 0

    def prepare() -> tuple[Source, TargetSpec, Watch]:
        opened = _open(source, tag, source_config)
        spec = identity_spec(opened, form=form, stage=stage, world_size=world_size, layout=layout, precision=precision)
        spec = with_experts(spec, opened, expert_parallel, form=form, stage=stage, world=world_size, layout=layout)
        if first:
            check_target(target, spec, form)
        return opened, spec, Watch(opened)

    opened, spec, watch = together(comm, prepare)
    told = [*notes(opened, spec, form), *expert_notes(spec)]
    if first:
        say(_summary(opened, spec, form, stage, world_size, told))

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return opened.read(name, state, start, stop).float()

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
            manifest_more=more, expected=_digests(opened, spec, form), comm=comm, progress=done.update,
            max_file_bytes=largest, watch=watch, say=say,
        )  # fmt: skip
    if first:
        say(f"written  {folder}")
    return folder


def _digests(source: Source, spec: TargetSpec, form: str) -> dict[tuple[str, str], str]:
    """The digests that the source's manifest knows, of what source and target both hold as float32."""
    if form == "hub" and spec.precision != "fp32":
        return {}
    return {
        (name, state): digest
        for name, entry in (source.manifest or {}).get("tensors", {}).items()
        if name in source.tensors and source.tensors[name].trainable and source.tensors[name].dtype == "float32"
        for state, digest in entry.get("digest", {}).items()
    }


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
    source: Source, *, form: str, stage: int | None, world_size: int | None, layout: str | None, precision: str | None
) -> TargetSpec:
    """The target as the source is. layout: None or "source" keeps its groups, their order, and the order in them."""
    names = _model_order(source) if form == "zero" else list(source.tensors)
    kept = layout in (None, "source") and bool(source.groups)
    members = _members(source, names)
    known = known_layout(source, members)
    spec = make_spec(
        source,
        shapes={name: source.tensors[name].shape for name in names},
        members=members,
        known=known,
        aliases={absent: name for absent, name in _tied(source).items() if absent not in names and name in names},
        config=dict(source.config or {}),
        made_of={name: [name] for name in names},
        reset=set(),
        order=lambda _: [name for group in source.groups for name in group["names"]],
        form=form,
        layout="source" if kept else layout,
        precision=precision or _precision(source, form),
    )
    if kept and form != "hub":
        parts = {tuple(g["names"]): str(g["part"]) for g in (source.manifest or {}).get("groups", ())}
        groups = tuple(replace(group, part=parts.get(group.names, group.part)) for group in spec.groups)
        spec = replace(spec, groups=groups, group_layout=known or "source")
    if form != "hub":  # however the target is cut: a run goes on with them on as many ranks as it had
        random = {file.name: file.read_bytes() for file in _random_states(source)}
        spec = replace(spec, extra_files={**spec.extra_files, **random})
    return spec


def _model_order(source: Source) -> list[str]:
    """The tensors' names in the model's order, by which native shards are addressed. Hugging Face files hold them in an
    order of their own: the table of the architecture tells. Raises UnsupportedGrowth where there is none."""
    if source.form != "hub" or (source.manifest or {}).get("tensors"):
        return list(source.tensors)
    from bert2bert.checkpoint_model import match

    try:
        model = match(source, source.config or {})
    except UserError as error:
        raise UnsupportedGrowth(
            f"{source.path}: a Hugging Face folder does not say in which order its model has the tensors, and native "
            f"shards are addressed by position ({str(error).splitlines()[0]}).\nUse --format universal, which goes by "
            "names."
        ) from None
    known = [model.stored(name) for name in model.parameters]
    return [*known, *(name for name in source.tensors if name not in set(known))]


def _members(source: Source, names: list[str]) -> Mapping[str, Member]:
    """What decides each tensor's group: the table of the architecture, or names and shapes where there is none."""
    from bert2bert.checkpoint_model import match

    found: dict[str, Member] = {**by_name({name: source.tensors[name].shape for name in names}, source.aliases)}
    try:
        model = match(source, source.config or {})
    except UserError:
        return found
    return found | {model.stored(name): parameter for name, parameter in model.parameters.items()}


def _random_states(source: Source) -> list[Path]:
    return sorted(source.folder.glob(_RANDOM))


def _tied(source: Source) -> dict[str, str]:
    """Tied names; a Hugging Face folder does not say them, its architecture does where it is known."""
    if source.form != "hub" or not source.config:
        return source.aliases
    from bert2bert.checkpoint_model import match

    try:
        model = match(source, source.config)
    except UserError:
        return source.aliases
    known = model.table.aliases(model.config, model.heads)
    return {model.stored(a): model.stored(k) for a, k in known.items() if model.stored(k) in source.tensors}


def _precision(source: Source, form: str) -> str:
    """The source's own; in a Hugging Face folder, the narrowest that holds every tensor unchanged."""
    if form != "hub" and source.form != "hub":
        return source.precision
    found = {_EXACT[meta.dtype] for meta in source.tensors.values()}
    return found.pop() if len(found) == 1 else "fp32"


def notes(source: Source, spec: TargetSpec, form: str) -> list[str]:
    """What the target does not hold, or holds otherwise, in sentences."""
    told = []
    if form == "hub" and source.form != "hub":
        held = [*source.states[1:], *(["groups"] if source.groups else [])]
        held += ["learning-rate scheduler"] if source.lr_scheduler else []
        held += ["client state"] if spec.client_state else []
        held += ["buffers"] if source.buffers else []
        held += ["random states"] if _random_states(source) else []
        held += ["which parameters are frozen"] if not all(m.trainable for m in source.tensors.values()) else []
        told.append(f"a Hugging Face folder holds weights only; left out: {', '.join([*held, 'counters'])}")
    if form == "hub" and not spec.config:
        told.append("the source has no config, so the folder has no config.json (--source-config FILE gives one)")
    if form == "hub" and spec.aliases:
        told.append(f"tied tensors are stored once: {', '.join(f'{a} = {k}' for a, k in spec.aliases.items())}")
    if source.form == "hub" and form != "hub":
        told.append("the source holds weights only: moments of zero, step 0, hyper-parameters of a fresh AdamW")
    if source.unread:
        told.append(f"not in the source, so not in the target: {', '.join(source.unread)}")
    low = spec.shapes if form == "hub" else spec.frozen  # stored in the target's precision alone
    rounded = [n for n in low if spec.precision not in ("fp32", _EXACT[source.tensors[n].dtype])]
    if rounded:
        told.append(f"rounded to {spec.precision}: {len(rounded)} tensors of which no wider copy is stored")
    mixed = [g.part for g in spec.groups if len({source.step(n) for n in g.names}) > 1 and form != "hub"]
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


# ------------------------------------------------------------------------------------------------ verify


def is_reshard(source: Source, target: Source) -> bool:
    """Whether the target says that it is some checkpoint anew, and the source is not that which it was grown from."""
    manifest = target.manifest or {}
    if not manifest.get("reshard"):
        return False
    grown_from = (manifest.get("growth") or {}).get("source") or {}
    return grown_from.get("sha256") is None or grown_from["sha256"] != source.identity()["sha256"]


def compare(source: Source, target: Source, check: Callable[[str, bool, str], None]) -> None:
    """Check the target against the source: every bit of every state that it holds, names, steps and groups."""
    recorded = target.manifest["reshard"]["source"] if target.manifest else {}
    mine = source.identity()
    odd = [key for key in recorded if key != "path" and mine.get(key) != recorded[key]]
    said = f"written from tag {recorded.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(odd)})"
    check("source", not odd, said if odd else "the checkpoint that was written anew")
    have, want = target.tensors, source.tensors
    lost = [n for n in {**want, **have} if n not in have or n not in want or have[n].shape != want[n].shape]
    check("names", not lost, f"{len(lost)} differ, first {lost[0]}" if lost else f"{len(want)} tensors")
    both = [name for name in want if name not in lost]
    for state in target.states:
        wrong = [name for name in both if not _same(source, target, name, state)]
        what = "weights" if state == "fp32" else state
        check(what, not wrong, f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(both)}, bit for bit")
    if target.form == "hub":
        return
    if len(source.states) > 1:
        most = {n: max(map(source.step, g["names"])) for g in target.groups for n in g["names"] if n in want}
        off = [f"{n}: {source.step(n)} -> {target.step(n)}" for n in most if target.step(n) != most[n]]
        check("step", not off, off[0] if off else f"kept ({', '.join(sorted({str(s) for s in most.values()}))})")
    moved = [name for name in both if want[name].trainable != have[name].trainable]
    moved += [name for name, buffer in source.buffers.items() if not _bits(buffer, target.buffers.get(name))]
    check("frozen", not moved, f"{moved[0]} differs" if moved else "frozen parameters and buffers are the same")
    for what in ("counters", "lr_scheduler"):
        one, other = getattr(source, what), getattr(target, what)
        if one:
            check(what.replace("_", " "), one == other, "kept" if one == other else f"{one} -> {other}")


def _same(source: Source, target: Source, name: str, state: str) -> bool:
    from bert2bert.shards.layout import row_blocks

    for start, stop in row_blocks(source.tensors[name].shape):
        found = target.read(name, state, start, stop)
        expected = source.read(name, state, start, stop) if state in source.states else found.new_zeros(found.shape)
        if not _bits(expected.to(found.dtype), found):
            return False
    return True


def _bits(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Equal shapes, dtypes and bits: NaN is NaN, and -0 is not 0."""
    import torch

    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
