"""The command ``plan``: what a growth will do, read off its plan: sizes, operators, exactness, cost, every tensor.

Reads no tensor. Refuses what `growth.opened` refuses, a disk bandwidth that is not two positive numbers, and less than
one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bert2bert.algebra.plan import Exactness, TensorPlan
from bert2bert.checkpoints.factors import GrowthFactors
from bert2bert.errors import some
from bert2bert.growth.exactness import reasons, zeroed
from bert2bert.growth.factors import of_growth
from bert2bert.growth.opened import Growth, open_growth
from bert2bert.growth.source_model import CheckpointModel, short_of_class
from bert2bert.measure.cost import Cost, bandwidth, cost, flops_per_token, row_length

_LABELS = {  # recipe key -> what a summary calls it
    "width": "width", "depth": "depth", "vocab": "vocabulary", "positions": "positions", "experts": "experts",
    "embeddings": "embeddings",
    "break_symmetry": "symmetry breaker", "moments": "moments", "seed": "seed",
}  # fmt: skip


@dataclass(frozen=True)
class TensorLine:
    """One target tensor in the listing."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """The source's tensors that it is made of, by their names in the files."""
    axes: str
    """Its spec."""
    bytes: int
    """Of the parameter and its optimizer states, in float32."""
    how: str
    """How it is made, in a few words."""


@dataclass(frozen=True, eq=False)
class Description:
    """What a growth will do, apart from its cost."""

    growth: Growth
    parameters: tuple[int, int]
    """How many numbers source and target have."""
    bytes_read: int
    bytes_written: int
    forward_flops: tuple[float, float] | None
    """Of source and target, a token; None without a language-model head."""
    factors: GrowthFactors
    """Those by which a run follows the source's."""
    tensors: dict[str, TensorLine]

    def as_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        model, plan = self.growth.model, self.growth.plan
        return {
            "source": model.source.identity(),
            "prefix": model.naming.prefix,
            "left": list(model.left),
            "operators": plan.recipe,
            "digest": plan.digest(),
            "exactness": reasons(plan.exactness),
            "moments": plan.moments,
            "warnings": list(plan.warnings),
            "notes": list(plan.notes),
            "factors": self.factors.to_json(),
            "parameters": list(self.parameters),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "forward_flops_per_token": list(self.forward_flops) if self.forward_flops else None,
            "tensors": {
                name: {"shape": list(t.shape), "from": list(t.sources), "axes": t.axes, "bytes": t.bytes, "how": t.how}
                for name, t in self.tensors.items()
            },
        }

    def summary(self) -> str:
        """The growth in a few lines, for a terminal."""
        model, recipe = self.growth.model, self.growth.plan.recipe
        lines = [_source(model)]
        if self.growth.other is not None:
            rest, alpha = 1 - recipe["alpha"], recipe["alpha"]
            lines.append(f"with     {rest:g} of {self.growth.other.source.path}, {alpha:g} of the grown")
            recipe = recipe["interpolate"][-1]
        lines += [
            *_operators(recipe, model.trained),
            f"size     {self.parameters[0]:,} -> {self.parameters[1]:,} parameters, "
            f"{self.bytes_read / 1e9:.3g} GB read, {self.bytes_written / 1e9:.3g} GB written "
            f"({', '.join(model.source.kept)})",
            *(f"note     {text}" for text in source_notes(model)),
        ]
        if self.forward_flops:
            small, large = self.forward_flops
            ratio = f"({large / small:.2f}x)"
            rows = f"in rows of {row_length(self.growth.plan.config):,}"
            lines.append(f"compute  {small / 1e6:.4g} -> {large / 1e6:.4g} MFLOP a token forward, {rows} {ratio}")
        lines += self._kept()
        if not model.trained and recipe.get("moments"):
            lines.append(f"note     --moments {recipe['moments']} changes nothing: the source holds weights only")
        return "\n".join(lines)

    def _kept(self) -> Iterator[str]:
        """What is kept of function and moments, and the advice of the plan."""
        plan, trained = self.growth.plan, self.growth.model.trained
        kept = reasons(plan.exactness)
        for what, policy in (("function", ""), *([("moments", f" ({plan.moments})")] if trained else [])):
            yield f"{what:8} " + ("exact" if not kept[what] else "not exact: " + "; ".join(kept[what])) + policy
        if trained:
            yield self._factors()
        yield from (f"warning  {text}" for text in plan.warnings)
        yield from (f"note     {text}" for text in plan.notes)
        if trained:
            yield from _first_step(self.growth)

    def _factors(self) -> str:
        """How many different factors there are, and what has none."""
        plan, without = self.growth.plan, self.factors.without
        text = f"{len(self.factors.distinct(plan.tensors))} different on learning rate, decay and epsilon"
        if without:
            why = some(list(dict.fromkeys(without.values())))
            text += f", none for {len(without)} of {len(plan.tensors)} tensors: {why}"
        elif plan.exactness == Exactness():
            text += ", with which AdamW follows the source's run"
        return f"factors  {text}"


@dataclass(frozen=True, eq=False)
class Planned:
    """A `Description` and what carrying it out costs."""

    description: Description
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        return self.description.as_json() | {"cost": self.cost.as_json()}

    def text(self) -> str:
        """The summary, the cost, and a line for every target tensor."""
        tensors = self.description.tensors
        wide = max(len(name) for name in tensors)
        lines = [self.description.summary(), self.cost.line()]
        lines.append(f"\n{'target tensor':{wide}}  {'shape':14} {'bytes':>14}  {'from':{wide}}  how")
        for name, t in tensors.items():
            shape = " x ".join(map(str, t.shape))
            lines.append(f"{name:{wide}}  {shape:14} {t.bytes:14,}  {', '.join(t.sources) or '-':{wide}}  {t.how}")
        return "\n".join(lines)


def plan(source: Path, config: Path, *, ranks: int, disk: str, **how: Any) -> Planned:
    """Plan the growth of a checkpoint. disk: ``READ,WRITE`` in GB/s of one rank; how: options of `open_growth`.

    Raises UserError of all kinds.
    """
    speed = bandwidth(disk)
    growth = open_growth(source, config, **how)
    return Planned(describe(growth), cost(growth, ranks, speed))


def describe(growth: Growth) -> Description:
    """What a growth will do."""
    model, plan = growth.model, growth.plan
    numel = sum(prod(p.shape) for p in model.parameters.values()), sum(prod(t.shape) for t in plan.tensors.values())
    each = 4 * len(model.source.states)
    flops = None
    if "lm" in model.heads:
        flops = flops_per_token(model.config, model.heads), flops_per_token(plan.config, model.heads)
    return Description(
        growth,
        parameters=numel,
        bytes_read=each * numel[0],
        bytes_written=each * numel[1],
        forward_flops=flops,
        factors=of_growth(growth),
        tensors={
            name: TensorLine(t.shape, tuple(map(model.stored, t.sources)), t.spec, each * prod(t.shape), _how(t))
            for name, t in plan.tensors.items()
        },
    )


def source_notes(model: CheckpointModel) -> list[str]:
    """What was found in the source's files that is not simply read, in sentences."""
    found = list(model.source.notes)
    if renamed := model.naming.renamed:
        new, old = next(iter(renamed.items()))
        if model.source.format == "hub":
            found.append(
                f"{len(renamed)} tensors have other names in the files than in transformers (first {old}: {new})"
            )
    found += short_of_class(model.table, model.config, model.heads)
    if model.untied:
        found.append(f"not tied, whatever the config says: {model.untied[0]} differs from {model.untied[1]}; both grow")
    if copies := model.copies():
        found.append(f"copies of tied tensors, of which one counts: {some([f'{a} = {k}' for a, k in copies.items()])}")
    if model.left:
        found.append(f"left out, for no current {model.table.model_type} has them: {some(model.left)}")
    return found


def _source(model: CheckpointModel) -> str:
    source, step = model.source, model.source.counters.get("global_steps")
    return (
        f"source   {source.path} ({source.format}"
        + (f", stage {source.stage}, world size {source.world_size}" if source.stage else "")
        + (f", step {step}" if step is not None else "")
        + (f", name prefix {model.naming.prefix!r}" if model.naming.prefix else "")
        + ")"
    )


def _operators(recipe: dict[str, Any], trained: bool) -> list[str]:
    """The operators of one growth, the axes that they change, and where each layer comes from."""
    asked = recipe if trained else {**recipe, "moments": None}
    return [
        "operator " + ", ".join(f"{_LABELS[k]} {asked[k]}" for k in _LABELS if asked.get(k) is not None),
        "axes     " + (", ".join(f"{a} {s} -> {t}" for a, (s, t) in recipe["axes"].items()) or "unchanged"),
        *(f"{axis.replace('_', ' '):8} {' '.join(rows)}" for axis, rows in recipe["layers"].items()),
    ]


def _how(tensor: TensorPlan) -> str:
    if not tensor.terms and tensor.fill:
        return f"fill {tensor.fill.kind}"
    grown = any(d.param is not None or d.grad is not None or not d.full for t in tensor.terms for d in t.dims)
    text = "copy" if not grown else "corner" if tensor.fill else "grow"
    if tensor.sums:
        text += f", a sum of {len(tensor.terms)}"
    elif any(d.new for t in tensor.terms for d in t.dims):
        text = "copy for each expert"
    elif any(t.given is not None for t in tensor.terms):
        text += " + given rows"
    elif len(tensor.terms) > 1:
        text += ", fresh units from above"
    if tensor.mixes:
        text += " + mixed rows"
    if tensor.fill:
        text += f" + {tensor.fill.kind} fill"
    return text + (" + noise" if tensor.noise else "")


def _first_step(growth: Growth) -> list[str]:
    """The size of the first update where moments start at zero at a late step, with the source's own betas."""
    if not zeroed(growth.plan.tensors.values()):
        return []
    betas = [group.get("betas", (0.9, 0.999)) for group in growth.model.source.groups]
    factors = [(1 - b1) / (1 - b2) ** 0.5 for b1, b2 in betas]
    if not factors:
        return []
    return [f"note     entries with zeroed moments: first update {max(factors):.3g} x the learning rate"]
