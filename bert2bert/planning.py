"""The command ``plan``: a source checkpoint and a target config, matched and described without reading a tensor.

Refuses what `operators.growth` and `checkpoint_model` refuse: a growth that the algebra cannot express, a config that
does not describe the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.checkpoint_model import CheckpointModel, open_model, read_config, short_of_class
from bert2bert.costs import flops_per_token
from bert2bert.errors import InvalidConfig, UnsupportedGrowth, some
from bert2bert.operators.compose import interpolate
from bert2bert.operators.exactness import zeroed
from bert2bert.operators.growth import plan_growth
from bert2bert.plan import GrowthPlan, TensorPlan
from bert2bert.tables import table_for

if TYPE_CHECKING:
    from bert2bert.realise import Read

_SAID = {  # recipe key -> how a summary calls it
    "width": "width", "depth": "depth", "vocab": "vocabulary", "positions": "positions", "experts": "experts",
    "break_symmetry": "symmetry breaker", "moments": "moments", "seed": "seed",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Growth:
    """A source opened as a model, and the plan by which it grows; plan names are canonical. other: the model that the
    grown one is interpolated with, of which the plan's first checkpoint is."""

    model: CheckpointModel
    plan: GrowthPlan
    other: CheckpointModel | None = None

    @property
    def reads(self) -> list[Read]:
        """A reader for each checkpoint that the plan starts from."""
        return [m.read for m in (self.other, self.model) if m is not None]

    def roots(self, name: str) -> list[str]:
        """The source's tensors, by canonical name, that a target tensor is made of; it goes on with the first's group
        and step."""
        own = self.plan.leaves - 1
        return [source for leaf, source in self.plan.roots(name) if leaf == own]


def open_growth(
    source: Path,
    config: Path,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    other: Path | None = None,
    alpha: float | None = None,
    **how: Any,
) -> Growth:
    """Open a source and plan its growth into the target config's model; reads no tensor. how: as of `plan_growth`.

    other, alpha: a checkpoint of the target's size, of which 1 - alpha is taken, and alpha of the grown model.
    """
    target = read_config(config)
    model = open_model(source, source_config, tag)
    plan = plan_growth(model.config, target, heads=model.heads, optimizer=_trained(model), **how)
    plan = replace(plan, config={**plan.config, "architectures": _classes(model, plan.config)})
    if other is None:
        if alpha is not None:
            raise InvalidConfig("--alpha belongs to --with CHECKPOINT; leave it out")
        return Growth(model, plan)
    if alpha is None:
        raise InvalidConfig("--with needs --alpha, the share of the grown model, from 0 to 1 (0.5 and 0.25 are usual)")
    second = open_model(other)
    return Growth(model, between(second, model, plan, alpha, how.get("moments")), second)


def between(
    second: CheckpointModel, model: CheckpointModel, plan: GrowthPlan, alpha: float, moments: str | None
) -> GrowthPlan:
    """1 - alpha of a checkpoint of the plan's target size, and alpha of the plan. Raises UnsupportedGrowth."""
    table = table_for(plan.config)
    if second.config.get("model_type") != table.model_type:
        raise UnsupportedGrowth(
            f"--with {second.source.path}: a {second.config.get('model_type')}, the grown model is a {table.model_type}"
            f"; interpolation needs a checkpoint of the target's architecture and size"
        )
    have, want = table.axis_sizes(second.config), table.axis_sizes(plan.config)
    for axis in table.sizes:
        if have[axis] != want[axis] and axis != "labels":  # which count only where a head has them
            raise UnsupportedGrowth(
                f"--with {second.source.path}: {axis} is {have[axis]} there and {want[axis]} in the grown model "
                f"({table.key(axis)}); interpolation needs a checkpoint of the target's size"
            )
    if set(model.source.states) - set(second.source.states) and moments != "reset":
        raise UnsupportedGrowth(
            f"--with {second.source.path}: it holds weights only, so there are no moments to interpolate; "
            f"use --moments reset, or a checkpoint with optimizer state"
        )
    same = plan_growth(second.config, plan.config, heads=second.heads, moments=moments, optimizer=_trained(model))
    return interpolate(same, plan, alpha)


def _trained(model: CheckpointModel) -> bool:
    """Whether the checkpoint has an optimizer's moments; if not, nothing is said of them."""
    return len(model.source.states) > 1


def _classes(model: CheckpointModel, target: Mapping[str, Any]) -> list[str] | None:
    """The transformers class of the grown model: the target config's, if it has these heads; the source's, if it has
    them but for a pooler, which older versions saved beside other heads; else one that has them."""
    classes = table_for(target).classes
    found = [name for name in target.get("architectures") or () if classes.get(name) == model.heads]
    own = model.config.get("architectures") or ()
    found += [name for name in own if name in classes and classes[name] <= model.heads <= classes[name] | {"pooler"}]
    found += [name for name, heads in classes.items() if heads == model.heads]
    return found[:1] or target.get("architectures")


def describe(growth: Growth) -> dict[str, Any]:
    """What a growth will do, as plain data: sizes, exactness, cost, and the origin of every target tensor."""
    model, plan = growth.model, growth.plan
    states = len(model.source.states)
    source_numel = sum(prod(p.shape) for p in model.parameters.values())
    target_numel = sum(prod(t.shape) for t in plan.tensors.values())
    per_token = [flops_per_token(c, model.heads) for c in (model.config, plan.config)] if "mlm" in model.heads else None
    return {
        "source": model.source.identity(),
        "prefix": model.naming.prefix,
        "left": list(model.left),
        "operators": plan.recipe,
        "digest": plan.digest(),
        "exactness": exactness(plan),
        "moments": plan.moments,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        "parameters": [source_numel, target_numel],
        "bytes_read": 4 * states * source_numel,
        "bytes_written": 4 * states * target_numel,
        "forwardflops_per_token": per_token,
        "tensors": {
            name: {
                "shape": list(t.shape),
                "from": [model.stored(s) for s in t.sources],
                "axes": t.spec,
                "bytes": 4 * states * prod(t.shape),
                "how": _how(t),
            }
            for name, t in plan.tensors.items()
        },
    }


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


def exactness(plan: GrowthPlan) -> dict[str, list[str]]:
    e = plan.exactness
    return {"function": list(e.function), "moments": list(e.moments)}


def summary(growth: Growth, d: dict[str, Any]) -> str:
    """The growth in a few lines, for a terminal. d: its `describe`."""
    model, plan = growth.model, growth.plan
    step = model.source.counters.get("global_steps")
    recipe, mixed = plan.recipe, []
    if growth.other is not None:
        mixed = [f"with     {1 - recipe['alpha']:g} of {growth.other.source.path}, {recipe['alpha']:g} of the grown"]
        recipe = recipe["interpolate"][-1]
    asked = recipe if _trained(model) else {**recipe, "moments": None}
    lines = [
        f"source   {model.source.path} ({model.source.form}"
        + (f", stage {model.source.stage}, world size {model.source.world_size}" if model.source.stage else "")
        + (f", step {step}" if step is not None else "")
        + (f", name prefix {prefix!r}" if (prefix := model.naming.prefix) else "")
        + ")",
        *mixed,
        "operator " + ", ".join(f"{_SAID[k]} {asked[k]}" for k in _SAID if asked.get(k) is not None),
        "axes     " + (", ".join(f"{a} {s} -> {t}" for a, (s, t) in recipe["axes"].items()) or "unchanged"),
        *(f"{axis.replace('_', ' '):8} {' '.join(rows)}" for axis, rows in recipe["layers"].items()),
        f"size     {d['parameters'][0]:,} -> {d['parameters'][1]:,} parameters, "
        f"{d['bytes_read'] / 1e9:.3g} GB read, {d['bytes_written'] / 1e9:.3g} GB written "
        f"({', '.join(model.source.states)})",
        *(f"note     {text}" for text in said(model)),
    ]
    if d["forwardflops_per_token"]:
        small, large = d["forwardflops_per_token"]
        lines.append(f"compute  {small / 1e6:.4g} -> {large / 1e6:.4g} MFLOP a token forward ({large / small:.2f}x)")
    for what, policy in (("function", ""), *([("moments", f" ({plan.moments})")] if _trained(model) else [])):
        reasons = d["exactness"][what]
        lines.append(f"{what:8} " + ("exact" if not reasons else "not exact: " + "; ".join(reasons)) + policy)
    lines += [f"warning  {text}" for text in d["warnings"]]
    lines += [f"note     {text}" for text in d["notes"]]
    if _trained(model):
        lines += _first_step(growth)
    elif recipe.get("moments"):
        lines.append(f"note     --moments {recipe['moments']} changes nothing: the source holds weights only")
    return "\n".join(lines)


def said(model: CheckpointModel) -> list[str]:
    """What was found in the source's files that is not simply read, in sentences."""
    told = list(model.source.notes)
    if renamed := model.naming.renamed:
        new, old = next(iter(renamed.items()))
        if model.source.form == "hub":
            told.append(
                f"{len(renamed)} tensors have other names in the files than in transformers (first {old}: {new})"
            )
    told += short_of_class(model.table, model.config, model.heads)
    if model.left:
        told.append(f"left out, for no current {model.table.model_type} has them: {some(model.left)}")
    return told


def _first_step(growth: Growth) -> list[str]:
    """The size of the first update where moments start at zero at a late step, with the source's own betas."""
    if not zeroed(growth.plan.tensors.values()):
        return []
    factors = {
        (1 - b1) / (1 - b2) ** 0.5 for b1, b2 in (g.get("betas", (0.9, 0.999)) for g in growth.model.source.groups)
    }
    return (
        [f"note     entries with zeroed moments: first update {max(factors):.3g} x the learning rate"]
        if factors
        else []
    )
