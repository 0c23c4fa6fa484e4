"""A growth opened: a source checkpoint as a model, and the plan of its growth into a target config. Reads no tensor.

Refuses what `growth.plan` and `growth.source_model` refuse (a growth that the algebra cannot express, a config that
does not describe the checkpoint), and a second checkpoint that the grown model cannot be interpolated with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import InvalidConfig, LossyGrowth, UnsupportedGrowth
from bert2bert.growth.choices import Choices
from bert2bert.growth.compose import interpolate
from bert2bert.growth.plan import plan_growth
from bert2bert.growth.source_model import CheckpointModel, open_model, read_config
from bert2bert.tables import table_for

if TYPE_CHECKING:
    from bert2bert.algebra.realise import Read


@dataclass(frozen=True, eq=False)
class Growth:
    """A source opened as a model, and the plan by which it grows."""

    model: CheckpointModel
    plan: GrowthPlan
    """Its names are canonical."""
    other: CheckpointModel | None = None
    """The model that the grown one is interpolated with: the first of the two checkpoints that the plan reads."""

    @property
    def reads(self) -> list[Read]:
        """A reader for each checkpoint that the plan starts from."""
        return [m.read for m in (self.other, self.model) if m is not None]

    def roots(self, name: str) -> list[str]:
        """The source's tensors, by canonical name, that a target tensor is made of; it goes on with the first's group
        and step."""
        own = self.plan.leaves - 1
        return [source for leaf, source in self.plan.roots(name) if leaf == own]

    def dtypes(self, name: str) -> list[str]:
        """The dtypes, by torch's names, of the stored tensors that a target tensor is made of."""
        models = [m for m in (self.other, self.model) if m is not None]
        return [models[leaf].source.meta(models[leaf].stored(root)).dtype for leaf, root in self.plan.roots(name)]

    def accept(self, lossy: bool) -> None:
        """Raise LossyGrowth for a plan that misses its operator's promise, unless that was accepted."""
        reasons = self.plan.exactness.lossy
        if reasons and not lossy:
            raise LossyGrowth(
                "this width cannot keep the function:\n  " + "\n  ".join(reasons) + "\n"
                "Choose a width that is a multiple of the source's, or accept the change with --lossy; "
                "the drift is then measured and stored."
            )


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
    """Open a source and plan its growth into the target config's model; reads no tensor. how: as of `Choices.parse`.

    other, alpha: a checkpoint of the target's size, of which 1 - alpha is taken, and alpha of the grown model.
    """
    choices = Choices.parse(**how)
    target = read_config(config)
    model = open_model(source, source_config, tag)
    return planned(model, target, choices, None if other is None else partial(open_model, other), alpha)


def planned(
    model: CheckpointModel,
    target: Mapping[str, Any],
    choices: Choices,
    other: Callable[[], CheckpointModel] | None = None,
    alpha: float | None = None,
) -> Growth:
    """Plan the growth of an open model into that of the config ``target``. other: opens the one to interpolate with,
    which is done last. Raises UnsupportedGrowth, InvalidConfig, and what ``other`` raises."""
    target = _tied_alike(model, target)
    if model.untied and model.table.tied(target):
        own, kept = model.untied
        raise UnsupportedGrowth(
            f"{model.source.path}: {own} differs from {kept}, of which its config makes it a copy, so the two count as "
            "untied, as in transformers; the target config ties them, and a growth cannot change that.\nIf the "
            "difference is meant, set tie_word_embeddings to false in the target config; if not, remove "
            f"{own} from the source."
        )
    plan = plan_growth(model.config, target, choices, heads=model.heads, optimizer=model.trained)
    plan = replace(plan, config={**plan.config, "architectures": _classes(model, plan.config)})
    if other is None:
        if alpha is not None:
            raise InvalidConfig("--alpha belongs to --with CHECKPOINT; leave it out")
        return Growth(model, plan)
    if alpha is None:
        raise InvalidConfig("--with needs --alpha, the share of the grown model, from 0 to 1 (0.5 and 0.25 are usual)")
    second = other()
    return Growth(model, between(second, model, plan, alpha, choices.moments), second)


def _tied_alike(model: CheckpointModel, target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The target's config, tied as the source is where transformers has it from the file alone: T5's config says
    nothing of it. What its key for that does mean must still agree, as in every growth."""
    table = table_for(target)
    alike = table.retied(target, model.table.tied(model.config))
    key = table.names.untie
    return alike if key and table.settled(alike)[key] == model.table.settled(model.config).get(key) else target


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
    for axis in table.sizes.axes:
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
    choices = Choices.parse(moments=moments)
    same = plan_growth(second.config, plan.config, choices, heads=second.heads, optimizer=model.trained)
    return interpolate(same, plan, alpha)


def _classes(model: CheckpointModel, target: Mapping[str, Any]) -> list[str] | None:
    """The transformers class of the grown model: the target config's, if it has these heads; the source's, if it has
    them except a pooler, which older versions saved beside other heads; else one that has them."""
    classes = table_for(target).names.classes
    found = [name for name in target.get("architectures") or () if classes.get(name) == model.heads]
    own = model.config.get("architectures") or ()
    found += [name for name in own if name in classes and classes[name] <= model.heads <= classes[name] | {"pooler"}]
    found += [name for name, heads in classes.items() if heads == model.heads]
    return found[:1] or target.get("architectures")
