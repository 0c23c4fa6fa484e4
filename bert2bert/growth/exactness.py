"""What a growth keeps, its warnings and its notes: derived from its maps, never assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bert2bert.algebra.maps import Gather
from bert2bert.algebra.plan import Exactness, TensorPlan
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Layer, Pair

ZEROED = (
    "entries with zeroed moments keep the step count, so their first Adam update is (1-beta1)/sqrt(1-beta2) "
    "times the learning rate: 3.16x for betas (0.9, 0.999), 0.71x for (0.9, 0.98), 0.45x for (0.9, 0.95); "
    "1x where all entries of an optimizer group are new, for its step count is too. Warm the rate up again, or "
    "start every moment from zero with --moments reset."
)


_HEADLESS = frozenset({"decoder", "pooler"})  # what a model without a head for a task may have


def zeroed(tensors: Iterable[TensorPlan]) -> bool:
    """Whether some entries' moments start at zero while others carry theirs, and the step count, on: the first update
    of the former is large. A tensor of fresh entries alone counts, for it may share an optimizer group."""
    kept = [plan for plan in tensors if not plan.reset]
    return any(p.terms for p in kept) and any(
        not p.terms
        or p.fill is not None
        or any(mask is not None for mask in p.fresh)
        or any(t.given is not None for t in p.terms)
        for p in kept
    )


def exactness(build: Builder) -> Exactness:
    """The reasons why function and moments change: none for an exact growth."""
    pair, width, why = build.pair, build.width, build.width.reasons
    if width.copying.nothing:
        return Exactness(("nothing of the source is copied",), ("moments start at zero",))
    function, moments, lossy = list(why.function), list(why.moments), []
    for axis in sorted(pair.table.norms.axes & set(pair.grown)) if not width.norms.averaged else ():
        gather = build.map(axis, 0)
        if not gather.is_uniform:
            low, high = int(gather.counts.min()), int(gather.counts.max())
            lossy.append(
                f"{axis} {pair.small[axis]} -> {pair.large[axis]}: features have {low} to {high} copies, and a norm "
                f"keeps copies only when all have equally many"
            )
        elif not gather.is_even:
            moments.append(f"{axis} is normalised and its copies have uneven shares")
    function += lossy
    for axis, rows in build.layers.items() if width.copying.terms is None else ():
        function += _depth(pair, axis, rows, build)
        moments += _depth_moments(axis, rows, pair.table.norms.pre)
    if function and not moments:
        moments.append("the function changes, so moments are carried over by the same maps, a heuristic")
    return Exactness(tuple(function), tuple(moments), tuple(lossy), why.softmax)


def _depth_moments(axis: str, rows: Sequence[Layer], pre: bool) -> list[str]:
    found = []
    if any(row.identity or row.source is None for row in rows):
        found.append(f"{axis}: the moments of inserted layers start at zero")
    if pre and any(row.step != 1.0 for row in rows):
        found.append(f"{axis}: moments of copies that share a step are right to first order in the residual branches")
    if runs := max((row.runs for row in rows), default=1) - 1:
        found.append(
            f"{axis}: every unshared layer starts with moments of the mean gradient over its {runs + 1} runs; its "
            f"own second moment is larger where runs disagree, so its steps are up to {(runs + 1) ** 0.5:.3g} "
            f"times too large for about 1/(1-beta2) steps"
        )
    return found


def reasons(kept: Exactness) -> dict[str, list[str]]:
    """Why function and moments change, as a manifest and ``plan --json`` have it."""
    return {"function": list(kept.function), "moments": list(kept.moments)}


def _depth(pair: Pair, axis: str, rows: Sequence[Layer], build: Builder) -> list[str]:
    small, large, table = pair.small[axis], pair.large[axis], pair.table
    change = f"{'depth' if axis == 'layers' else axis} {small} -> {large}"
    found = []
    drawn = sum(row.source is None and not row.identity for row in rows)
    if drawn:
        found.append(f"{change}: {drawn} layers are drawn at random")
    elif any(row.runs > 1 for row in rows):
        found.append(
            f"{change}: the function kept is that of the {small} layers run {rows[0].runs} times with shared weights, "
            f"not that of one run"
        )
    elif any(row.step != 1.0 for row in rows) and table.norms.pre:
        found.append(
            f"{change}: copies share their layer's step, which keeps the function only to first order in the residual "
            f"branches"
        )
    elif any(row.step != 1.0 for row in rows):
        found.append(
            f"{change}: copies share their layer's step, but norms follow the residual sum, so no layer is a step of a "
            f"differential equation, and the function changes"
        )
    elif [row.source for row in rows if not row.identity] != list(range(small)):
        found.append(f"{change}: stacked layers change the function")
    elif len(rows) > small and not table.norms.pre:
        found.append(
            f"{change}: inserted layers still normalise, so they are not identities where norms follow the sum"
        )
    copied = [(i, row.source) for i, row in enumerate(rows) if row.source is not None and not row.identity]
    above = [str(i) for i, source in copied if i > source == 0]
    for name in table.later(axis) if above else ():
        if name in build.patterns:
            found.append(f"{change}: layer {', '.join(above)} copies layer 0, which has no {name}; it starts fresh")
    there = [table.layer_kind(pair.target, i) for i in range(large)]
    if any(table.layer_kind(pair.source, source) != there[i] for i, source in copied):
        kinds = [there[i] if r.source is None else table.layer_kind(pair.source, r.source) for i, r in enumerate(rows)]
        found.append(
            f"{change}: layers of one attention pattern take the place of another's; "
            f"{table.compatible.kinds}={kinds} in the target config keeps each layer's own"
        )
    return found


def warnings(
    build: Builder, tensors: Mapping[str, TensorPlan], broken: bool, moments: str, optimizer: bool
) -> tuple[str, ...]:
    """What a user must know before training goes on: copies that stay equal, moments that start at zero.

    broken: whether a symmetry breaker was chosen. optimizer: whether the source has moments; if not, all start alike,
    and no warning is about them.
    """
    found = []
    apart = broken or (optimizer and moments == "asymmetric")
    if not apart and not build.width.noise and not build.width.keeps_moments:
        found += _equal_copies(build, optimizer and moments in ("exact", "carried"), optimizer)
    experts = build.width.maps.get("experts")
    if not apart and isinstance(experts, Gather) and (experts.counts > 1).any():
        found.append(
            "copies of an expert score alike, so they are chosen together and learn the same for ever. To break the "
            "symmetry: --break-symmetry noise" + _instead(optimizer)
        )
    if optimizer and zeroed(tensors.values()):
        found.append(ZEROED)
    return tuple(found)


def _instead(optimizer: bool) -> str:
    return ", or --moments asymmetric." if optimizer else "."


def _even_axes(build: Builder) -> list[str]:
    """The grown axes on which some copies have even shares."""
    maps = {axis: build.width.maps.get(axis, ()) for axis in build.width.maps if axis in build.pair.grown}
    found = {axis: [made] if isinstance(made, Gather) else made for axis, made in maps.items()}
    return [axis for axis, made in found.items() if any(g.is_even and (g.counts > 1).any() for g in made)]


def _equal_copies(build: Builder, mapped: bool, optimizer: bool) -> list[str]:
    """The warning of copies that nothing tells apart, if there are such. mapped: whether their moments are mapped."""
    pair, borrow, axes = build.pair, build.width.copying.borrow, _even_axes(build)
    # Borrowing tells copies apart, hidden ones by the biases, but the last layer has none beyond it to borrow from.
    borrowed = bool(borrow) and pair.layers > 1
    if borrowed and build.output_biases & build.patterns:
        axes = [axis for axis in axes if axis in pair.table.sizes.units]
    if not axes:
        return []
    dropout = any("drop" in key and isinstance(value, float) and value > 0 for key, value in pair.target.items())
    edge = "top layer, which has none above" if borrow > 0 else "bottom layer, which has none below"
    return [
        f"copies on {', '.join(axes)}"
        + (f" in the source's {edge} it to borrow from," if borrowed else "")
        + " are even"
        + (" and carry exactly mapped moments" if mapped else "")
        + ": without dropout they stay identical for ever and that added width learns nothing. "
        + ("The target config has dropout, which tells them apart slowly. " if dropout else "")
        + "To break the symmetry: "
        + ("" if borrowed else "--width aki, ")
        + "--break-symmetry noise | uneven"
        + _instead(optimizer)
    ]


def notes(build: Builder, moments: str, optimizer: bool) -> tuple[str, ...]:
    """What mapped moments mean for Adam, where the source has some (optimizer): steps of matrices that read copies,
    epsilon; and advice of the operators."""
    pair, width = build.pair, build.width
    gathers = {} if width.copying.nothing else {axis: build.map(axis, 0) for axis in pair.grown}
    counts = {axis: gather.counts.max() for axis, gather in gathers.items() if (gather.counts > 1).any()}
    found = []
    if optimizer and counts and moments in ("exact", "carried"):
        each = ", ".join(f"{count} on {axis}" for axis, count in counts.items())
        found.append(
            f"Adam moves a matrix that reads copied features as many times faster as there are copies ({each}), "
            f"compared with the source. What writes copies has gradients smaller by that number: epsilon weighs as "
            f"many times more there, and the global gradient norm, which is clipped, changes too. Where "
            f"copies are equally many, the manifest's factors on learning rate, weight decay and epsilon make up for "
            f"all but the clipping."
        )
    if optimizer and moments == "reset":
        found.append(
            "a fresh optimizer moves every entry by the whole learning rate in its first step, however small the "
            "gradient: warm the rate up again"
        )
    if (eps := width.norms.eps) != 1.0:
        found.append(f"the target config's {pair.table.norms.eps[0]} is multiplied by {eps:.6g}, to keep the function")
    if "embed" in pair.grown and pair.heads <= _HEADLESS and not width.copying.nothing:
        found.append(
            f"no head reads the hidden state, so it is what the model says: of its {pair.large['embed']} features each "
            f"is a copy of one of the source's {pair.small['embed']}, or new"
        )
    return (*found, *width.reasons.notes)
