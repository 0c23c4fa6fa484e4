"""The command ``grow``: from a source checkpoint and a target config to a grown checkpoint.

Parameters that the source run had frozen stay frozen, and so do what grows of them alone. Refuses a width that misses
its promise of exactness unless that is accepted (`LossyGrowth`), a target folder that holds a checkpoint already, and
an optimizer whose states are not known to grow, where the target format keeps them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.errors import InvalidConfig, LossyGrowth, UnsupportedGrowth
from bert2bert.groups import LAYOUTS, decays, param_groups
from bert2bert.planning import Growth, describe, exactness, open_growth, summary

if TYPE_CHECKING:
    from bert2bert.shards.source import Source
    from bert2bert.shards.writing import TargetSpec

_NO_HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}


def accept(growth: Growth, lossy: bool) -> None:
    """Raise LossyGrowth for a plan that misses its operator's promise, unless that was accepted."""
    reasons = growth.plan.exactness.lossy
    if reasons and not lossy:
        raise LossyGrowth(
            "this width cannot keep the function:\n  " + "\n  ".join(reasons) + "\n"
            "Choose a width that is a multiple of the source's, or accept the change with --lossy; "
            "the drift is then measured and stored."
        )


def target_names(growth: Growth, form: str) -> dict[str, str]:
    """Canonical name -> the target's name of every tensor and tied copy: the training script's own, as in the source;
    in a Hugging Face folder those of transformers, whose base models lack the outer name."""
    model, plan = growth.model, growth.plan
    names = [*plan.tensors, *plan.aliases]
    if form != "hub":
        return {name: model.stored(name) for name in names}
    cls = (plan.config.get("architectures") or [""])[0]
    base = cls.endswith("Model") and not cls.endswith("LMHeadModel")
    return {name: name.removeprefix(model.table.outer) if base else name for name in names}


def target_spec(growth: Growth, *, form: str, layout: str | None, precision: str | None) -> TargetSpec:
    """Everything about the checkpoint to write but its values. layout: optimizer groups, None = as the source has."""
    from bert2bert.shards.hub_writer import beside
    from bert2bert.shards.moments import ADAM
    from bert2bert.shards.writing import TargetGroup, TargetSpec

    model, plan = growth.model, growth.plan
    source = model.source
    if source.other_states and form != "hub":
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer keeps {', '.join(source.other_states)}. How these grow is not known (known "
            "are the states of Adam, AdamW, LAMB, Lion, Muon, and SGD with momentum).\n"
            "Grow the weights alone with --format hub."
        )
    named = target_names(growth, form)

    def trained(origin: str) -> bool:
        return source.tensors[source.aliases.get(model.stored(origin), model.stored(origin))].trainable

    own = {n: [s for leaf, s in plan.roots(n) if leaf == plan.leaves - 1] for n in plan.tensors}
    # Made of frozen ones alone, a tensor is frozen; of others too, it goes on with a trained one's group and step.
    origins = {named[n]: next(filter(trained, found), growth.root(n)) for n, found in own.items()}
    frozen = [named[n] for n, found in own.items() if found and not any(map(trained, found)) and form != "hub"]
    reset = {named[n] for n, t in plan.tensors.items() if t.reset}
    groups = source.groups or []
    of_name = {name: i for i, group in enumerate(groups) for name in group["names"]}
    known = source.manifest.get("group_layout") if source.manifest else _layout_of(groups, list(source.tensors))
    chosen = layout or known or "source"
    if form == "hub" or (layout is None and not groups):
        chosen = "layers"  # there are none to keep
    elif chosen == "source" and not groups:
        raise InvalidConfig(f"--groups source: {source.path} holds weights only, and no optimizer groups; leave it out")

    def group_of(name: str) -> int | None:
        origin = origins[name]
        return of_name.get(model.stored(origin)) if origin else next(
            (i for i, g in enumerate(groups) if bool(g.get("weight_decay")) == decays(name)), 0 if groups else None
        )  # fmt: skip

    def hyper(name: str, decay: bool) -> dict[str, Any]:
        i = group_of(name)
        if i is not None:
            return {k: v for k, v in groups[i].items() if k != "names"}
        return _NO_HYPER | {"weight_decay": 0.01 if decay else 0.0}

    def step(name: str) -> int:
        origin = origins[name]
        if origin is None or name in reset or len(source.states) == 1:
            return 0  # nothing of the source's optimizer is carried over: a fresh one
        return source.step(model.stored(origin))

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

    names = [name for name in origins if name not in frozen]
    if chosen == "source":
        ordered = _as_in(source, names, form)
        members = [tuple(n for n in ordered if group_of(n) == i) for i in range(len(groups))]
        shapes = {named[n]: t.shape for n, t in plan.tensors.items()}
        members = [
            tuple(sorted(ns, key=shapes.__getitem__, reverse=True)) if groups[i].get("use_muon") else ns
            for i, ns in enumerate(members)
        ]
        sets = [(f"group.{i}", bool(groups[i].get("weight_decay")), ns) for i, ns in enumerate(members) if ns]
    else:
        sets = [(g.part, g.decay, g.names) for g in param_groups(names, chosen)]
    return TargetSpec(
        shapes={named[n]: t.shape for n, t in plan.tensors.items()},
        aliases={named[a]: named[b] for a, b in plan.aliases.items()},
        config=plan.config,
        # Where a group joins differently trained layers: too few steps would make Adam's first updates too large.
        groups=tuple(
            TargetGroup(part, d, ns, hyper(ns[0], d), max(map(step, ns)), moments(ns)) for part, d, ns in sets
        ),
        group_layout=chosen,
        precision=precision or _precision(source, form),
        states=source.states if form != "hub" else source.states[:1],
        counters={k: int(source.counters.get(k) or 0) for k in ("global_steps", "global_samples", "skipped_steps")},
        lr_scheduler=source.lr_scheduler,
        loss_scaler=source.loss_scaler if source.precision == "fp16" else None,  # bf16's is a fixed scale of 1
        client_state={
            k: v for k, v in source.client_state.items() if k not in ("bert2bert", "universal_checkpoint_info")
        },
        buffers=source.buffers,
        extra_files=beside(plan.config, source.folder, source.path) if form == "hub" else {},
        frozen=tuple(frozen),
        fused=source.fused,
        clip_grad=source.clip_grad,
    )


def _layout_of(groups: list[dict[str, Any]], names: list[str]) -> str | None:
    """The layout whose rule gives exactly these groups, in this order, if any. names: in the model's order."""
    have = [tuple(g["names"]) for g in groups]
    owned = {name for group in have for name in group}
    ordered = [name for name in names if name in owned]
    for layout in LAYOUTS if have else ():
        if [g.names for g in param_groups(ordered, layout)] == have:
            return layout
    return None


def _as_in(source: Source, names: list[str], form: str) -> list[str]:
    """The target's names, given in the model's order, in the order in which the source's groups hold theirs.

    A native shard is addressed by position, so the order must be the script's own: the model's, or by name. Raises
    UnsupportedGrowth for native shards in any other order, which a larger model's names do not follow.
    """
    place = {name: i for i, name in enumerate(source.tensors)}
    groups = [group for group in source.groups if not group.get("use_muon")]  # DeepSpeed sorts Muon's by shape
    if all(group["names"] == sorted(group["names"], key=place.__getitem__) for group in groups):
        return names
    if all(group["names"] == sorted(group["names"]) for group in groups):
        return sorted(names)
    if form == "zero":
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer groups hold their parameters neither in the model's order nor by name, so "
            "the order that the training script will expect of a larger model is not known.\nUse --format universal, "
            "which is addressed by name, or choose the groups with --groups."
        )
    return names


def _precision(source: Any, form: str) -> str:
    """A run goes on in its own precision; a hub folder made from fp32 masters keeps them whole."""
    return "fp32" if form == "hub" and source.form != "hub" else source.precision


def grow(
    source: Path,
    target: Path,
    config: Path,
    *,
    form: str = "universal",
    stage: int | None = None,
    world_size: int | None = None,
    precision: str | None = None,
    layout: str | None = None,
    lossy: bool = False,
    measure: bool = True,
    bins: Path | None = None,
    shard_size: str | None = None,
    comm: Any = None,
    say: Callable[[str], None] = print,
    **how: Any,
) -> Path:
    """Grow a checkpoint and commit it; the folder written. ``how``: options of `open_growth`.

    Every rank of ``comm`` calls this alike; rank 0 reports, measures the change of the function (streamed, one layer in
    memory) and commits. Raises UserError of all kinds; what is finished then, the same call uses again.
    """
    from bert2bert.drift import report_drift
    from bert2bert.realise import values
    from bert2bert.sample import Tokens
    from bert2bert.shards.hub_writer import MAX_FILE_BYTES, file_bytes
    from bert2bert.shards.transfer import together, write_checkpoint
    from bert2bert.shards.watch import Watch
    from bert2bert.shards.writing import check_target

    if form == "zero" and (stage is None or (world_size is None and stage)):
        raise InvalidConfig(
            "--format zero needs --stage 0|1|2|3 and, but for stage 0, --world-size N: native shards are written for "
            "one stage and one number of data-parallel ranks.\nThe default --format universal fits any."
        )
    if world_size is not None and world_size < 1:
        raise InvalidConfig(f"--world-size is {world_size}; expected at least 1, the number of data-parallel ranks")
    if form != "zero" and (stage is not None or world_size is not None):
        raise InvalidConfig(f"--stage and --world-size belong to --format zero, not to --format {form}; leave them out")
    if form == "hub" and layout is not None:
        raise InvalidConfig("--groups: a Hugging Face folder holds no optimizer groups; leave it out")
    if form != "hub" and shard_size is not None:
        raise InvalidConfig(f"--shard-size belongs to --format hub, not to --format {form}; leave it out")
    largest = MAX_FILE_BYTES if shard_size is None else file_bytes(shard_size)
    first = comm is None or comm.Get_rank() == 0

    def prepare() -> tuple[Growth, TargetSpec, Watch]:
        growth = open_growth(source, config, **how)
        watch = Watch(growth.model.source, *([growth.other.source] if growth.other else []))
        accept(growth, lossy)
        spec = target_spec(growth, form=form, layout=layout, precision=precision)
        if first:
            check_target(target, spec, form)
        return growth, spec, watch

    growth, spec, watch = together(comm, prepare)
    if first:
        say(summary(growth, describe(growth)))
    model, plan = growth.model, growth.plan
    canonical = {stored: n for n, stored in target_names(growth, form).items()}
    grown = values(plan, growth.reads)

    def read(name: str, state: str, start: int, stop: int) -> Any:
        return grown(canonical[name], state, start, stop)

    measured = together(
        comm, lambda: report_drift(growth, Tokens(bins), say) if measure and first and "mlm" in model.heads else None
    )
    manifest = {
        "operators": plan.recipe,
        "plan_digest": plan.digest(),
        "source": model.source.identity(),
        **({"with": growth.other.source.identity()} if growth.other else {}),
        "source_config": model.config,
        "source_spent": _spent(model.source.manifest),
        "tokenizer_digest": _tokenizer_digest(model.source.manifest),
        "prefix": model.prefix,
        "exactness": exactness(plan),
        "warnings": list(plan.warnings),
        "drift": measured.as_dict() if measured else None,
        "versions": {"bert2bert": version("bert2bert"), "torch": version("torch")},
    }
    total = len(spec.states) * 4 * sum(prod(s) for s in spec.shapes.values())
    with _progress(total, first) as bar:
        folder = write_checkpoint(
            target, spec, read, form=form, stage=stage, world_size=world_size, manifest_growth=manifest, comm=comm,
            progress=bar.update, max_file_bytes=largest, watch=watch, say=say,
        )  # fmt: skip
    if first:
        say(f"written  {folder}")
    return folder


def _spent(manifest: dict[str, Any] | None) -> dict[str, float] | None:
    """What training the source cost by its manifest, the cost of what it was itself grown from included."""
    manifest = manifest or {}
    parts = [(manifest.get("training") or {}).get("spent"), (manifest.get("growth") or {}).get("source_spent")]
    known = [part for part in parts if part]
    return {key: sum(part[key] for part in known) for key in known[0]} if known else None


def _tokenizer_digest(manifest: dict[str, Any] | None) -> str | None:
    """Of the tokenizer that the source, or what it was itself grown from, was trained with; None if not known."""
    manifest = manifest or {}
    data = (manifest.get("training") or {}).get("data") or manifest.get("growth") or {}
    found: str | None = data.get("tokenizer_digest")
    return found


def _progress(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, disable=not show or not sys.stderr.isatty(), desc="growing")
