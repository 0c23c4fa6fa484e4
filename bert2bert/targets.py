"""What commands that write a checkpoint share: the options of the target's format, and the target's description.

Refuses, as InvalidConfig, options that a format lacks or cannot use; as UnsupportedGrowth, an optimizer whose states
are not known, where the format keeps them, and groups that join differently trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bert2bert.errors import InvalidConfig, UnsupportedGrowth, some
from bert2bert.groups import LAYOUTS, Member, param_groups
from bert2bert.progress import progress as bytes_done

if TYPE_CHECKING:
    from bert2bert.shards.source import Source
    from bert2bert.shards.writing import TargetSpec

OWN_STATE = ("bert2bert", "universal_checkpoint_info")  # client state that belongs to the form it is written in
_NO_HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}


def check_form(
    form: str, stage: int | None, world_size: int | None, layout: str | None, shard_size: str | None,
    expert_parallel: int | None = None,
) -> int:  # fmt: skip
    """Refuse options that do not belong to the format (InvalidConfig); bytes of the largest weights file of a hub."""
    from bert2bert.shards.hub_writer import MAX_FILE_BYTES, file_bytes

    if form == "zero" and (stage is None or (world_size is None and stage)):
        raise InvalidConfig(
            "--format zero needs --stage 0|1|2|3 and, but for stage 0, --world-size N: native shards are written for "
            "one stage and one number of data-parallel ranks.\nThe default --format universal fits any."
        )
    if world_size is not None and world_size < 1:
        raise InvalidConfig(f"--world-size is {world_size}; expected at least 1, the number of data-parallel ranks")
    if form != "zero" and (stage is not None or world_size is not None):
        raise InvalidConfig(f"--stage and --world-size belong to --format zero, not to --format {form}; leave them out")
    if expert_parallel is not None and (form != "zero" or stage not in (1, 2)):
        raise InvalidConfig(
            f"--expert-parallel belongs to --format zero --stage 1 or 2, not to --format {form}"
            f"{'' if stage is None else f' --stage {stage}'}: DeepSpeed splits experts in other ways there, which are "
            "not written. Choose one of these stages, or leave it out."
        )
    if form == "hub" and layout is not None:
        raise InvalidConfig("--groups: a Hugging Face folder holds no optimizer groups; leave it out")
    if form != "hub" and shard_size is not None:
        raise InvalidConfig(f"--shard-size belongs to --format hub, not to --format {form}; leave it out")
    return MAX_FILE_BYTES if shard_size is None else file_bytes(shard_size)


def make_spec(
    source: Source,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    members: Mapping[str, Member],
    known: str | None,
    aliases: dict[str, str],
    config: dict[str, Any],
    made_of: Mapping[str, Sequence[str]],
    akin: Mapping[str, str],
    reset: set[str],
    order: Callable[[list[str]], list[str]],
    form: str,
    layout: str | None,
    precision: str,
    dtypes: Mapping[str, str] | None = None,
) -> TargetSpec:
    """Everything about the checkpoint to write but its values. Names are those of the files, source's and target's.

    members: what decides a tensor's group; known: the source's `known_layout`; made_of: the source's tensors of which
    each target tensor is made; it goes on with the first's group and step; akin: to what is made of nothing, the
    source's tensor whose group it joins; reset: tensors whose moments start anew;
    order: puts the names of the groups that the source has into the order that they are to have; layout: optimizer
    groups (`groups.LAYOUTS`, "source"), None: as the source's are known to be;
    dtypes: of tensors in a Hugging Face folder, by torch's name, where they are not of ``precision``.
    """
    import torch

    from bert2bert.shards import clients
    from bert2bert.shards.beside import grown_beside, json_bytes
    from bert2bert.shards.moments import ADAM
    from bert2bert.shards.writing import TargetGroup, TargetSpec

    if source.other_states and form != "hub":
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer keeps {', '.join(source.other_states)}. How these grow is not known (known "
            "are the states of Adam, AdamW, LAMB, Lion, Muon, and SGD with momentum).\n"
            "Take the weights alone with --format hub."
        )

    def trained(name: str) -> bool:
        return source.tensors[source.aliases.get(name, name)].trainable

    # Made of frozen ones alone, a tensor is frozen; of others too, it goes on with a trained one's group and step.
    origins = {name: next(filter(trained, found), next(iter(found), None)) for name, found in made_of.items()}
    frozen = [name for name, found in made_of.items() if found and not any(map(trained, found)) and form != "hub"]
    groups = source.groups or []
    of_name = {name: i for i, group in enumerate(groups) for name in group["names"]}
    chosen = layout or known or "source"
    if form == "hub" or (layout is None and not groups):
        chosen = "layers"  # there are none to keep
    elif chosen == "source" and not groups:
        raise InvalidConfig(f"--groups source: {source.path} holds weights only, and no optimizer groups; leave it out")

    def group_of(name: str) -> int | None:
        origin = origins[name] or akin.get(name)
        if origins[name] or origin in of_name:
            return of_name.get(origin)
        alike = (i for i, g in enumerate(groups) if bool(g.get("weight_decay")) == members[name].decay)
        return next(alike, 0 if groups else None)

    def hyper(names: tuple[str, ...], decay: bool) -> dict[str, Any]:
        """The first parameter's group's; in new groups, the decay is that of the first that has any, or none."""
        of = [groups[i] for i in map(group_of, names) if i is not None]
        if not of:
            return _NO_HYPER | {"weight_decay": 0.01 if decay else 0.0}
        found = {k: v for k, v in of[0].items() if k != "names"}
        if chosen not in ("source", known) and "weight_decay" in found:
            found["weight_decay"] = next((g["weight_decay"] for g in of if decay and g.get("weight_decay")), 0.0)
        return found

    def step(name: str) -> int:
        origin = origins[name]
        if origin is None or name in reset or len(source.states) == 1:
            return 0  # nothing of the source's optimizer is carried over: a fresh one
        return source.step(origin)

    def moments(names: tuple[str, ...]) -> dict[str, str]:
        found: list[dict[str, str]] = []
        for i in map(group_of, names):
            kept = source.moments[i] if i is not None and i < len(source.moments) else {}
            kept = kept or ({"exp_avg": "momentum_buffer"} if i is not None and groups[i].get("use_muon") else ADAM)
            found += [] if kept in found else [kept]
        if form == "hub":
            return dict(ADAM)  # there are none
        if len(found) > 1:
            raise UnsupportedGrowth(
                f"{source.path}: {names[0]} and others of its group ({chosen}) were trained by different optimizers, "
                "whose states do not mix.\nKeep the groups of the source: --groups source."
            )
        return dict(found[0])

    beside = clients.beside(source) if form != "hub" else {}
    if beside and config:
        beside["config.json"] = json_bytes(config)

    names = [name for name in origins if name not in frozen]
    if chosen == "source":
        ordered = order(names)
        kept = [tuple(n for n in ordered if group_of(n) == i) for i in range(len(groups))]
        kept = [
            tuple(sorted(ns, key=shapes.__getitem__, reverse=True)) if groups[i].get("use_muon") else ns
            for i, ns in enumerate(kept)
        ]
        sets = [(f"group.{i}", bool(groups[i].get("weight_decay")), ns) for i, ns in enumerate(kept) if ns]
    else:
        sets = [(g.part, g.decay, g.names) for g in param_groups({n: members[n] for n in names}, chosen)]
    return TargetSpec(
        shapes=dict(shapes),
        aliases=aliases,
        config=config | {"dtype": _loaded_as(source, precision, dtypes or {}, shapes)}
        if config and form == "hub"
        else config,
        # Where a group joins differently trained layers: too few steps would make Adam's first updates too large.
        groups=tuple(TargetGroup(part, d, ns, hyper(ns, d), max(map(step, ns)), moments(ns)) for part, d, ns in sets),
        group_layout=chosen,
        precision=precision,
        states=source.states if form != "hub" else source.states[:1],
        counters={k: int(source.counters.get(k) or 0) for k in ("global_steps", "global_samples", "skipped_steps")},
        lr_scheduler=source.lr_scheduler,
        loss_scaler=source.loss_scaler if source.precision == "fp16" else None,  # bf16's is a fixed scale of 1
        client_state={key: value for key, value in source.client_state.items() if key not in OWN_STATE},
        buffers=source.buffers,
        extras=source.extras,
        extra_files=grown_beside(config, source.folder, source.path) if form == "hub" else {},
        tag_name=source.tag,
        beside=beside,
        frozen=tuple(frozen),
        lists_frozen=source.lists_frozen,
        fused=source.fused,
        clip_grad=source.clip_grad,
        dtypes={name: getattr(torch, dtype) for name, dtype in (dtypes or {}).items() if form == "hub"},
    )


def own_precision(source: Source, form: str) -> str:
    """A target's where none was asked for: the source's; a Hugging Face folder keeps a run's fp32 master weights
    whole."""
    return "fp32" if form == "hub" and source.form != "hub" else source.precision


def _loaded_as(source: Source, precision: str, dtypes: Mapping[str, str], names: Collection[str]) -> Any:
    """The dtype that a Hugging Face folder's config tells from_pretrained to load it in. Where tensors keep their own,
    that of the source's config, so that both are loaded alike; where that says none, one that holds them all."""
    from bert2bert.shards.writing import DTYPES

    low = str(DTYPES[precision]).removeprefix("torch.")
    if source.form != "hub" or not dtypes:
        return low
    config = source.config or {}
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, dict) or said in ("float32", "float16", "bfloat16"):
        return said
    return widest([*dtypes.values(), *([low] if names - dtypes.keys() else [])])


def widest(dtypes: Iterable[str]) -> str:
    """The dtype, by torch's name, that holds every number of these unchanged; float32 is the widest that is written."""
    found = set(dtypes)
    return found.pop() if found in ({"float16"}, {"bfloat16"}) else "float32"


def rounding(spec: TargetSpec, form: str, dtypes: Mapping[str, Iterable[str]]) -> list[str]:
    """What is stored in a narrower dtype than it has in the source, in a sentence. dtypes: of what a tensor is made."""
    narrower: dict[str, list[str]] = {}
    for name, origins in dtypes.items():
        stored = str(spec.widest_dtype(name, form)).removeprefix("torch.")
        if any(origin not in (stored, "float16", "bfloat16") or (origin != stored != "float32") for origin in origins):
            narrower.setdefault(stored, []).append(name)
    return [
        f"rounded to {stored}: {len(names)} tensors that are wider in the source, first {names[0]}"
        for stored, names in narrower.items()
    ]


def still_frozen(spec: TargetSpec) -> list[str]:
    """Which parameters of a growth a script must freeze, in a sentence."""
    names = spec.frozen
    return [
        f"frozen, as all that they are made of: {len(names)} parameters, first {names[0]} (`bert2bert inspect --json` "
        "lists them); a script that goes on must freeze these and no others"
    ] if names else []  # fmt: skip


def regrouped(source: Source, spec: TargetSpec, made_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Where new groups give parameters other hyper-parameters than the source's, in sentences. made_of: as of
    `make_spec`."""
    of = {name: group for group in source.groups for name in group["names"]}
    told = []
    for key in ("lr", "betas", "eps", "weight_decay") if of else ():
        changed = [
            (name, was[key], group.hyper.get(key))
            for group in spec.groups
            for name in group.names
            for was in [of.get(next(iter(made_of[name]), ""), {})]
            if key in was and was[key] != group.hyper.get(key)
        ]
        if changed:
            name, was, now = changed[0]
            told.append(f"--groups: {key} changes for {len(changed)} parameters, first {name}: {was} -> {now}")
    return told


def left(source: Source, spec: TargetSpec) -> list[str]:
    """What lies beside the weights of a Hugging Face folder and is not carried into another, in a sentence."""
    from bert2bert.shards.beside import left_beside

    found = left_beside(source.folder, spec.extra_files, source.files)
    return [f"left behind in {source.folder}: {', '.join(found)}"] if found else []


def tagged(spec: TargetSpec, tag: str | None, form: str) -> TargetSpec:
    """The target under another tag, if one is given. Raises InvalidConfig."""
    from bert2bert.shards.clients import check_tag

    if tag is None:
        return spec
    if form == "hub":
        raise InvalidConfig("--target-tag: a Hugging Face folder has no tags; leave it out")
    check_tag(tag)
    return replace(spec, tag_name=tag)


def unopened(source: Source, form: str) -> list[str]:
    """A sentence about what a target keeps and nobody here has looked into."""
    names = source.unopened() if form != "hub" else []
    said = "carried as it is, unopened: what the run saved of classes not known here"
    return [f"{said} ({some(names, 4)})"] if names else []


def known_layout(source: Source, members: Mapping[str, Member]) -> str | None:
    """The layout that gives exactly the source's groups, in this order, if any: what its manifest says, where that is
    one. members: of the source's tensors, what decides their groups."""
    have = [tuple(group["names"]) for group in source.groups]
    owned = {name for group in have for name in group}
    if not owned <= members.keys():
        return None
    ordered = {name: members[name] for name in source.tensors if name in owned}
    said = (source.manifest or {}).get("group_layout")
    for layout in sorted(LAYOUTS, key=lambda layout: layout != said) if have else ():
        if [group.names for group in param_groups(ordered, layout)] == have:
            return layout
    return None


def versions() -> dict[str, str]:
    """Of the programs that made a checkpoint."""
    return {"bert2bert": version("bert2bert"), "torch": version("torch")}


def progress(total: int, comm: Any, what: str, show: bool = True) -> Any:
    """How many bytes have been written, told by rank 0, to whose share of all it is about right."""
    first, ranks = (True, 1) if comm is None else (comm.Get_rank() == 0, comm.Get_size())
    return bytes_done(total // ranks, what, show=show and first)
