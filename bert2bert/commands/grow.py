"""The command ``grow``: from a source checkpoint and a target config to a grown checkpoint.

Parameters that the source run had frozen stay frozen, and so does what grows of them alone (`growth.kin`). Refuses a
width that misses its promise of exactness unless that is accepted (`LossyGrowth`), a target folder that holds a
checkpoint already, and an optimizer whose states are not known to grow, where the target format keeps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bert2bert.algebra.realise import values
from bert2bert.checkpoints import clients
from bert2bert.checkpoints.commit.source_guard import Watch
from bert2bert.checkpoints.expert_parallel.target import notes as expert_notes
from bert2bert.checkpoints.facts import versions
from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.manifest import Grown, Manifest
from bert2bert.checkpoints.notes import (
    empty_groups,
    kept_groups,
    left,
    regrouped,
    rounding,
    still_frozen,
    unopened,
    untrained,
    valueless,
)
from bert2bert.checkpoints.of_ranks import first_ranks, of_ranks
from bert2bert.checkpoints.source import Source
from bert2bert.checkpoints.spec import Content, known_layout, make_spec, widest
from bert2bert.checkpoints.target import Target
from bert2bert.commands.done import done
from bert2bert.commands.plan import describe
from bert2bert.commands.writing import completed, write
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth import buffers, kin
from bert2bert.growth.exactness import reasons
from bert2bert.growth.factors import of_growth
from bert2bert.growth.named import Named
from bert2bert.growth.opened import Growth, open_growth
from bert2bert.growth.source_model import beyond_class
from bert2bert.measure.drift import Drift, report_drift
from bert2bert.measure.tokens import Tokens, check
from bert2bert.ranks.comm import ALONE, Comm, on_first, together
from bert2bert.tables import table_for


def target_spec(named: Named, target: Target) -> TargetSpec:
    """Everything about the checkpoint to write except its values."""
    growth, source, parts = named.growth, named.source, named.parts
    model, plan, stored = growth.model, growth.plan, named.stored
    grown = table_for(plan.config).parameters(plan.config, model.heads)
    own = source.format == "hub" and not target.precision  # each tensor's dtype is kept
    made = {name: growth.dtypes(part.name) for name, part in parts.items()} if own else {}
    akin, frozen = kin.akin(growth), kin.frozen(growth)
    content = Content(
        shapes={name: part.shape for name, part in parts.items()},
        aliases=named.aliases,
        config=plan.config,
        members={name: grown[part.name] for name, part in parts.items()},
        made_of=named.made_of(),
        akin={name: stored[akin[part.name]][0] for name, part in parts.items() if part.name in akin},
        frozen=frozenset(name for name, part in parts.items() if part.name in frozen),
        known=known_layout(source, {own: p for name, p in model.parameters.items() for own in stored[name]}),
        order=lambda names: _as_in(source, names, target.format),
        reset=frozenset(name for name, part in parts.items() if plan.tensors[part.name].reset),
        dtypes={name: widest(dtypes) for name, dtypes in made.items() if dtypes},
    )
    carried = buffers.grown(growth, target.format)
    spec = make_spec(source, content, target)
    spec = replace(spec, buffers=carried.buffers, extras=carried.extras, unread=named.unread)
    return of_ranks(source, spec, target)


def _as_in(source: Source, names: list[str], format: str) -> list[str]:
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
    if format == "zero":
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer groups hold their parameters neither in the model's order nor by name, so "
            "the order that the training script will expect of a larger model is not known.\nUse --format universal, "
            "which is addressed by name, or choose the groups with --groups."
        )
    return names


def grow(
    source: Path,
    folder: Path,
    config: Path,
    target: Target,
    *,
    lossy: bool = False,
    measure: bool = True,
    bins: Path | None = None,
    comm: Comm = ALONE,
    say: Callable[[str], None] = print,
    bar: bool = True,
    **how: Any,
) -> Path:
    """Grow a checkpoint and commit it; the folder written. ``how``: options of `open_growth`.

    Every rank of ``comm`` calls this alike; rank 0 reports, measures the change of the function (streamed, no
    model in memory) and commits. Raises UserError of all kinds; what is finished then, the same call uses again.
    """
    return write_growth(
        partial(open_growth, source, config, **how), folder, target, lossy=lossy, measure=measure, bins=bins, comm=comm,
        say=say, bar=bar,
    )  # fmt: skip


def write_growth(
    opened: Callable[[], Growth],
    folder: Path,
    target: Target,
    *,
    lossy: bool,
    measure: bool,
    bins: Path | None = None,
    comm: Comm = ALONE,
    say: Callable[[str], None] = print,
    bar: bool = True,
) -> Path:
    """`grow`, of a growth that ``opened`` gives on every rank. A target that already holds it stays as it is."""
    tokens = Tokens(bins)

    def prepare() -> tuple[Named, TargetSpec, Watch] | Path:
        growth = opened()
        check(tokens, growth.model.table.axis_sizes(growth.model.config)["vocab"], growth.model)
        watch = Watch(growth.model.source, *([growth.other.source] if growth.other else []))
        growth.accept(lossy)
        named = Named.of(growth, target.format)
        spec = target_spec(named, target)
        if (place := done(growth, spec, folder, target)) is not None:
            return place
        return named, completed(spec, growth.model.source, target, folder, comm), watch

    prepared = together(comm, prepare)
    if isinstance(prepared, Path):
        if comm.rank == 0:
            say(f"done     {prepared} is this growth already")
        return prepared
    named, spec, watch = prepared
    growth = named.growth
    if comm.rank == 0:
        noted = [f"note     {text}" for text in _notes(named, spec, folder, target)]
        say("\n".join([describe(growth).summary(), *noted]))
    drift = on_first(comm, lambda: _drift(named, spec, target, tokens, say)) if measure else None
    manifest = Manifest(kind="growth", growth=_grown(named, watch, drift))
    return write(
        folder, spec, named.read(), target, watch, manifest=manifest, comm=comm, say=say, bar="growing" if bar else None
    )  # fmt: skip


def _notes(named: Named, spec: TargetSpec, folder: Path, target: Target) -> list[str]:
    """What the target does not hold, or holds otherwise, in sentences."""
    growth, source, format = named.growth, named.source, target.format
    model = growth.model
    found = rounding(spec, format, {name: growth.dtypes(part.name) for name, part in named.parts.items()})
    found += [*expert_notes(spec), *named.notes()]
    if format != "hub":
        found += beyond_class(model.table, growth.plan.config, model.heads)
        found += [*regrouped(source, spec, named.made_of()), *_kept_groups(named, spec)]
        found += [*empty_groups(source, spec), *still_frozen(spec), *untrained(source, spec, target.stage)]
        found += [*valueless(named.unknown, loads=False), *valueless(named.unread, loads=target.stage in (None, 3))]
    if source.format == "hub":
        found += left(source, spec)
    found += [*buffers.unchanged(source, spec.buffers), *buffers.left_out(source, format), *unopened(source, format)]
    found += first_ranks(source, spec, target)
    return found + clients.notes(source, spec.beside, folder, target)


def _kept_groups(named: Named, spec: TargetSpec) -> list[str]:
    """What to know of groups where layers are added."""
    model, config = named.growth.model, named.growth.plan.config
    grown = table_for(config).parameters(config, model.heads)
    layers = {name: grown[part.name] for name, part in named.parts.items()}
    parts = {name: p.part for name, p in layers.items() if p.layer is not None}
    return kept_groups(spec, parts, {p.part for p in model.parameters.values()})


def _drift(named: Named, spec: TargetSpec, target: Target, tokens: Tokens, say: Callable[[str], None]) -> Drift | None:
    """How the function changes, on weights as the target will have them: rounded where it stores no wider copy."""
    growth = named.growth
    if "lm" not in growth.model.heads:
        say("drift    not measured: there is no language-model head")
        return None
    grown = values(growth.plan, growth.reads)
    dtypes = {part.name: spec.widest_dtype(name, target.format) for name, part in named.parts.items()}

    def written(name: str, start: int, stop: int) -> Any:
        return grown(name, "fp32", start, stop).to(dtypes[name])

    return report_drift(growth, written, tokens, say)


def _grown(named: Named, watch: Watch, drift: Drift | None) -> Grown:
    """The manifest's section ``growth``."""
    growth = named.growth
    model, plan = growth.model, growth.plan
    return Grown(
        operators=plan.recipe,
        plan_digest=plan.digest(),
        source=watch.identity,
        other=watch.identities[1] if growth.other else None,
        source_config=model.config,
        source_spent=_spent(model.source.manifest),
        tokenizer_digest=_tokenizer_digest(model.source.manifest),
        prefix=model.naming.prefix,
        exactness=reasons(plan.exactness),
        warnings=plan.warnings,
        drift=drift.as_dict() if drift else None,
        factors=of_growth(growth).of_each({name: part.name for name, part in named.parts.items()}),
        versions=versions(),
        inserted=inserted(growth),
        source_training=_training(model.source.manifest),
    )


def inserted(growth: Growth) -> tuple[str, ...]:
    """The parts of the layers that the source did not have: made of nothing, or of one that an earlier layer is made
    of."""
    own, plan = growth.model.parameters, growth.plan
    made_of: dict[str, Counter[tuple[str, int | None]]] = {}
    for name, p in table_for(plan.config).parameters(plan.config, growth.model.heads).items():
        if p.layer is not None and name in plan.tensors:
            found = made_of.setdefault(p.part, Counter())
            found.update((own[root].depth, own[root].layer) for root in growth.roots(name)[:1])
    known: set[tuple[str, int | None]] = set()
    new = []
    for part, sources in made_of.items():
        first = sources.most_common(1)[0][0] if sources else None
        new += [part] if first is None or first in known else []
        known |= {first} if first is not None else set()
    return tuple(new)


def _training(manifest: Manifest | None) -> dict[str, Any] | None:
    """Where the source's run stood, so that a run whose recipe goes on after the growth can."""
    return manifest.training.to_json() if manifest and manifest.training else None


def _spent(manifest: Manifest | None) -> dict[str, float] | None:
    """What training the source cost by its manifest, the cost of what it was itself grown from included."""
    if manifest is None:
        return None
    parts = [manifest.training and manifest.training.spent, manifest.growth and manifest.growth.source_spent]
    known = [part for part in parts if part]
    return {key: sum(part[key] for part in known) for key in known[0]} if known else None


def _tokenizer_digest(manifest: Manifest | None) -> str | None:
    """Of the tokenizer that the source, or what it was itself grown from, was trained with; None if not known."""
    if manifest and manifest.training and manifest.training.data:
        return manifest.training.data.get("tokenizer_digest")
    return manifest.growth.tokenizer_digest if manifest and manifest.growth else None
