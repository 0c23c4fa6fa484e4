"""What a growth keeps, and what has to be said about it: derived from its maps, never assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bert2bert.algebra.maps import Gather
from bert2bert.algebra.plan import Exactness, TensorPlan
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Layer, Pair, Width

ZEROED = (
    "entries with zeroed moments keep the step count, so their first Adam update is (1-beta1)/sqrt(1-beta2) "
    "times the learning rate: 3.16x for betas (0.9, 0.999), 0.71x for (0.9, 0.98), 0.45x for (0.9, 0.95); "
    "1x where all entries of an optimizer group are new, for its step count is too. Warm the rate up again, or "
    "start every moment anew with --moments reset."
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


def exactness(pair: Pair, width: Width, layers: Mapping[str, Sequence[Layer]], build: Builder) -> Exactness:
    """The reasons why function and moments change: none for an exact growth."""
    if not width.copy:
        return Exactness(("nothing of the source is copied",), ("moments start at zero",))
    function, moments, lossy = list(width.function), list(width.moments), []
    for axis in sorted(pair.table.normalised & set(pair.grown)):
        gather = build.map(axis, 0)
        if width.averaged:
            continue
        if not gather.is_uniform:
            low, high = int(gather.counts.min()), int(gather.counts.max())
            lossy.append(
                f"{axis} {pair.small[axis]} -> {pair.large[axis]}: features have {low} to {high} copies, and a norm "
                f"keeps copies only when all have equally many"
            )
        elif not gather.is_even:
            moments.append(f"{axis} is normalised and its copies have uneven shares")
    function += lossy
    for axis, rows in layers.items():
        function += _depth(pair, axis, rows, build)
        if any(row.identity or row.source is None for row in rows):
            moments.append(f"{axis}: the moments of inserted layers start at zero")
        if runs := max((row.runs for row in rows), default=1) - 1:
            moments.append(
                f"{axis}: every unshared layer starts with moments of the mean gradient over its {runs + 1} runs; its "
                f"own second moment is larger where runs disagree, so its steps are up to {(runs + 1) ** 0.5:.3g} "
                f"times too large for about 1/(1-beta2) steps"
            )
    if function and not moments:
        moments.append("the function changes, so moments are carried over by the same maps, a heuristic")
    return Exactness(tuple(function), tuple(moments), tuple(lossy), width.softmax)


def reasons(kept: Exactness) -> dict[str, list[str]]:
    """Why function and moments change, as a manifest and ``plan --json`` have it."""
    return {"function": list(kept.function), "moments": list(kept.moments)}


def _depth(pair: Pair, axis: str, rows: Sequence[Layer], build: Builder) -> list[str]:
    small, large, table = pair.small[axis], pair.large[axis], pair.table
    change = f"{'depth' if axis == 'layers' else axis} {small} -> {large}"
    found = []
    drawn = sum(row.source is None for row in rows)
    if drawn:
        found.append(f"{change}: {drawn} layers are drawn at random")
    elif any(row.runs > 1 for row in rows):
        found.append(
            f"{change}: the function kept is that of the {small} layers run {rows[0].runs} times with shared weights, "
            f"not that of one run"
        )
    elif [row.source for row in rows if not row.identity] != list(range(small)):
        found.append(f"{change}: stacked layers change the function")
    elif len(rows) > small and not table.prenorm:
        found.append(
            f"{change}: inserted layers still normalise, so they are no identity where norms follow the residual sum"
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
            f"{change}: layers of one attention pattern take the place of another's; {table.kinds}={kinds} in the "
            f"target config keeps each layer's own"
        )
    return found


def warnings(
    pair: Pair,
    width: Width,
    build: Builder,
    tensors: Mapping[str, TensorPlan],
    breaker: str | None,
    moments: str,
    optimizer: bool,
) -> tuple[str, ...]:
    """What a user must know before training goes on: locked copies, zeroed moments. optimizer: whether the source has
    moments; if not, all start alike, and nothing is said of them."""
    found = []
    parted = optimizer and moments == "asymmetric"
    instead = ", or --moments asymmetric." if optimizer else "."
    even = [
        axis
        for axis, maps in width.maps.items()
        if any(g.is_even and (g.counts > 1).any() for g in ([maps] if isinstance(maps, Gather) else maps))
        and axis in pair.grown
    ]
    # Borrowing tells copies apart, hidden ones by the biases, but the last layer has none beyond it to borrow from.
    borrowed = bool(width.borrow) and pair.layers > 1
    biased = borrowed and bool(build.output_biases & build.patterns)
    locked = [axis for axis in even if axis in pair.table.units or not biased] if borrowed else even
    if locked and breaker is None and not width.noise and not parted and not width.kept:
        dropout = any("drop" in key and isinstance(value, float) and value > 0 for key, value in pair.target.items())
        mapped = " and carry exactly mapped moments" if optimizer and moments in ("exact", "carried") else ""
        edge = "top layer, which has none above" if width.borrow > 0 else "bottom layer, which has none below"
        where = f" in the source's {edge} it to borrow from," if borrowed else ""
        found.append(
            f"copies on {', '.join(locked)}{where} are even{mapped}: without dropout they stay "
            f"identical for ever and that added width learns nothing. "
            + ("The target config has dropout, which tells them apart slowly. " if dropout else "")
            + "To break the symmetry: "
            + ("" if borrowed else "--width aki, ")
            + "--break-symmetry noise | uneven"
            + instead
        )
    twins = [
        m for axis, m in width.maps.items() if axis == "experts" and isinstance(m, Gather) and (m.counts > 1).any()
    ]
    if twins and breaker is None and not parted:
        found.append(
            "copies of an expert score alike, so they are chosen together and learn the same for ever. To break the "
            "symmetry: --break-symmetry noise" + instead
        )
    if optimizer and zeroed(tensors.values()):
        found.append(ZEROED)
    return tuple(found)


def notes(pair: Pair, width: Width, build: Builder, moments: str, optimizer: bool) -> tuple[str, ...]:
    """What mapped moments mean for Adam, where the source has some (optimizer): steps of matrices that read copies,
    epsilon; and advice of the operators."""
    counts = {}
    for axis in pair.grown if width.copy else ():
        gather = build.map(axis, 0)
        if (gather.counts > 1).any():
            counts[axis] = gather.counts.max()
    found = []
    if optimizer and counts and moments in ("exact", "carried"):
        each = ", ".join(f"{count} on {axis}" for axis, count in counts.items())
        found.append(
            f"Adam moves a matrix that reads copied features as many times faster as there are copies ({each}), "
            f"compared with the source; its learning rate divided by that number, and its weight decay multiplied by "
            f"it, follow the source exactly. What writes copies has gradients smaller by that number: epsilon weighs "
            f"as many times more there, and the global gradient norm, which is clipped, changes too."
        )
    if optimizer and moments == "reset":
        found.append(
            "a fresh optimizer moves every entry by the whole learning rate in its first step, however small the "
            "gradient: warm the rate up again"
        )
    if width.eps != 1.0:
        found.append(f"the target config's {pair.table.eps[0]} is multiplied by {width.eps:.6g}, to keep the function")
    if "embed" in pair.grown and pair.heads <= _HEADLESS and width.copy:
        found.append(
            f"no head reads the hidden state, so it is what the model says: of its {pair.large['embed']} features each "
            f"is a copy of one of the source's {pair.small['embed']}, or new"
        )
    return (*found, *width.notes)
