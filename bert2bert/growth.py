"""The command ``grow``: from a source checkpoint and a target config to a grown checkpoint.

Parameters that the source run had frozen stay frozen, and so do what grows of them alone. Refuses a width that misses
its promise of exactness unless that is accepted (`LossyGrowth`), a target folder that holds a checkpoint already, and
an optimizer whose states are not known to grow, where the target format keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert import buffers
from bert2bert.checkpoint_model import beyond_class, class_name
from bert2bert.errors import LossyGrowth, UnsupportedGrowth
from bert2bert.expert_targets import notes, with_experts
from bert2bert.planning import Growth, describe, exactness, open_growth, summary
from bert2bert.tables import table_for
from bert2bert.targets import (
    check_form,
    known_layout,
    left,
    make_spec,
    own_precision,
    progress,
    regrouped,
    rounding,
    still_frozen,
    tagged,
    unopened,
    versions,
    widest,
)

if TYPE_CHECKING:
    from bert2bert.shards.source import Source
    from bert2bert.shards.writing import TargetSpec
    from bert2bert.tables.base import Parameter


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
    """Canonical name -> the target's name of every tensor and tied copy: in a Hugging Face folder, and from one whose
    names have no prefix, those of transformers; else the training script's own, as in the source."""
    model, plan = growth.model, growth.plan
    plain = form == "hub" or (model.source.form == "hub" and not model.naming.prefix)
    return {
        name: class_name(model.table, plan.config, name) if plain else model.stored(name)
        for name in (*plan.tensors, *plan.aliases)
    }


def target_spec(growth: Growth, *, form: str, layout: str | None, precision: str | None) -> TargetSpec:
    """Everything about the checkpoint to write but its values. layout: optimizer groups, None = as the source has."""
    model, plan = growth.model, growth.plan
    source, named, made = model.source, target_names(growth, form), origins(growth)
    grown = table_for(plan.config).parameters(plan.config, model.heads)
    spec = make_spec(
        source,
        shapes={named[n]: t.shape for n, t in plan.tensors.items()},
        members={named[n]: p for n, p in grown.items()},
        known=known_layout(source, {model.stored(n): p for n, p in model.parameters.items()}),
        aliases={named[a]: named[b] for a, b in plan.aliases.items()},
        config=plan.config,
        made_of=_made_of(growth, named),
        akin={named[n]: model.stored(s) for n, s in _akin(growth, grown).items()},
        reset={named[n] for n, t in plan.tensors.items() if t.reset},
        order=lambda names: _as_in(source, names, form),
        form=form,
        layout=layout,
        precision=precision or own_precision(source, form),
        dtypes={named[n]: widest(d) for n, d in made.items() if d} if source.form == "hub" and not precision else {},
    )
    carried = buffers.grown(growth, form)
    return replace(spec, buffers=carried.buffers, extras=carried.extras)


def origins(growth: Growth) -> dict[str, list[str]]:
    """Canonical name -> the dtypes, by torch's names, of the stored tensors that a target tensor is made of."""
    models = [m for m in (growth.other, growth.model) if m is not None]
    return {
        name: [models[leaf].source.meta(models[leaf].stored(source)).dtype for leaf, source in growth.plan.roots(name)]
        for name in growth.plan.tensors
    }


def _made_of(growth: Growth, named: dict[str, str]) -> dict[str, list[str]]:
    """The source's tensors that each target tensor is made of, by the names of the files."""
    return {named[n]: [growth.model.stored(s) for s in growth.roots(n)] for n in growth.plan.tensors}


def _akin(growth: Growth, grown: Mapping[str, Parameter]) -> dict[str, str]:
    """To each target tensor that is made of nothing (an inserted block's zeros), the source's tensor of the same kind:
    of the layer that the rest of its layer is made of, else of any. grown: the target's parameters."""
    own = growth.model.parameters
    roots = {name: growth.roots(name) for name in growth.plan.tensors}
    layers: dict[tuple[str, int | None], int | None] = {}
    for name, found in roots.items():
        for root in found:
            if own[root].depth == grown[name].depth:
                layers.setdefault((grown[name].depth, grown[name].layer), own[root].layer)
    at = {(p.pattern, p.layer): name for name, p in reversed(own.items())}
    of_kind = {p.pattern: name for name, p in reversed(own.items())}
    akin = {}
    for name in (n for n, found in roots.items() if not found):
        p = grown[name]
        one = at.get((p.pattern, layers.get((p.depth, p.layer))), of_kind.get(p.pattern))
        if one is not None:
            akin[name] = one
    return akin


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


def grow(
    source: Path,
    target: Path,
    config: Path,
    *,
    form: str = "universal",
    stage: int | None = None,
    world_size: int | None = None,
    expert_parallel: int | None = None,
    target_tag: str | None = None,
    precision: str | None = None,
    layout: str | None = None,
    lossy: bool = False,
    measure: bool = True,
    bins: Path | None = None,
    shard_size: str | None = None,
    comm: Any = None,
    say: Callable[[str], None] = print,
    bar: bool = True,
    **how: Any,
) -> Path:
    """Grow a checkpoint and commit it; the folder written. ``how``: options of `open_growth`.

    Every rank of ``comm`` calls this alike; rank 0 reports, measures the change of the function (streamed, no
    model in memory) and commits. Raises UserError of all kinds; what is finished then, the same call uses again.
    """
    from bert2bert.drift import report_drift
    from bert2bert.realise import values
    from bert2bert.sample import Tokens, check
    from bert2bert.shards import clients
    from bert2bert.shards.transfer import together, write_checkpoint
    from bert2bert.shards.watch import Watch
    from bert2bert.shards.writing import check_target

    largest = check_form(form, stage, world_size, layout, shard_size, expert_parallel)
    first = comm is None or comm.Get_rank() == 0

    def prepare() -> tuple[Growth, TargetSpec, Watch]:
        growth = open_growth(source, config, **how)
        check(Tokens(bins), growth.model.table.axis_sizes(growth.model.config)["vocab"], growth.model)
        watch = Watch(growth.model.source, *([growth.other.source] if growth.other else []))
        accept(growth, lossy)
        spec = target_spec(growth, form=form, layout=layout, precision=precision)
        spec = with_experts(
            spec, growth.model.source, expert_parallel, form=form, stage=stage, world=world_size, layout=layout
        )
        spec = tagged(spec, target_tag, form)
        if first:
            check_target(target, spec, form)
        return growth, spec, watch

    growth, spec, watch = together(comm, prepare)
    model, plan, named = growth.model, growth.plan, target_names(growth, form)
    told = [*rounding(spec, form, {named[n]: dtypes for n, dtypes in origins(growth).items()}), *notes(spec)]
    if form != "hub":
        told += beyond_class(model.table, plan.config, model.heads)
        told += [*regrouped(model.source, spec, _made_of(growth, named)), *still_frozen(spec)]
    elif model.source.form == "hub":
        told += left(model.source, spec)
    told += [*buffers.left_out(model.source, form), *unopened(model.source, form)]
    told += clients.notes(model.source, spec.beside, target, form, world_size)
    if first:
        say("\n".join([summary(growth, describe(growth)), *(f"note     {text}" for text in told)]))
    canonical = {stored: n for n, stored in named.items()}
    grown = values(plan, growth.reads)

    def read(name: str, state: str, start: int, stop: int) -> Any:
        return grown(canonical[name], state, start, stop)

    def written(name: str, start: int, stop: int) -> Any:
        """Weights as the target will have them: rounded where it stores no wider copy."""
        return grown(name, "fp32", start, stop).to(spec.widest_dtype(named[name], form))

    measure = measure and first
    if measure and "mlm" not in model.heads:
        say("drift    not measured: there is no language-model head")
        measure = False
    measured = together(comm, lambda: report_drift(growth, written, Tokens(bins), say) if measure else None)
    manifest = {
        "operators": plan.recipe,
        "plan_digest": plan.digest(),
        "source": watch.identity,
        **({"with": watch.identities[1]} if growth.other else {}),
        "source_config": model.config,
        "source_spent": _spent(model.source.manifest),
        "tokenizer_digest": _tokenizer_digest(model.source.manifest),
        "prefix": model.naming.prefix,
        "exactness": exactness(plan),
        "warnings": list(plan.warnings),
        "drift": measured.as_dict() if measured else None,
        "versions": versions(),
    }
    total = len(spec.states) * 4 * sum(prod(s) for s in spec.shapes.values())
    with progress(total, comm, "growing", bar) as done:
        folder = write_checkpoint(
            target, spec, read, form=form, stage=stage, world_size=world_size, manifest_growth=manifest, comm=comm,
            progress=done.update, max_file_bytes=largest, watch=watch, say=say,
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
