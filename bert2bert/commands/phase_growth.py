"""The growths of a recipe: checked before a run starts, and carried out between two phases or by `bert2bert grow`.

Refuses what `growth.plan` refuses, with the phase named, and the growth of a phase that has none.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from bert2bert.checkpoints.commit.pending import check_complete
from bert2bert.checkpoints.target import Target
from bert2bert.commands.grow import write_growth
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, LossyGrowth, UserError
from bert2bert.growth.choices import Choices
from bert2bert.growth.opened import Growth, planned
from bert2bert.growth.plan import plan_growth
from bert2bert.growth.source_model import open_model
from bert2bert.model import registry
from bert2bert.ranks.comm import Comm, on_first
from bert2bert.recipe import Recipe
from bert2bert.tables import table_for


def check(recipe: Recipe) -> None:
    """Raise InvalidConfig, before anything runs, for a growth that its operators cannot do: sizes and operators of all
    phases follow from the recipe alone. Does nothing for a recipe that takes its model from a checkpoint."""
    if recipe.model is None:
        return
    before = registry.typed(recipe.model)
    for i, phase in enumerate(recipe.phases):
        if phase.grow is None:
            continue
        after = registry.typed(recipe.models[i])
        try:
            plan = plan_growth(before, after, Choices.parse(**phase.grow.operators), heads=_heads(before))
            if plan.exactness.lossy and not phase.grow.lossy:
                raise LossyGrowth(
                    "this width cannot keep the function: " + "; ".join(plan.exactness.lossy) + ". Choose a multiple, "
                    f"or accept the change with phases.{i}.grow.lossy"
                )
        except UserError as error:
            raise InvalidConfig(f"phases.{i} ({phase.name!r}): its growth cannot be done: {error}") from None
        before = after


def _heads(config: dict[str, object]) -> frozenset[str]:
    return table_for(config).names.classes[registry.class_of(config)]


def opened(recipe: Recipe, index: int, source: Path, other: Path | None = None) -> Growth:
    """The growth of a checkpoint before a phase of a recipe. other: the checkpoint that it is mixed with. Raises
    UserError of all kinds."""
    grow = recipe.phases[index].grow
    if grow is None:
        raise InvalidConfig(f"the recipe's phase {recipe.phases[index].name!r} begins without a growth")
    model = open_model(source)
    target = grow.target(model.config) if recipe.model is None else recipe.models[index]
    second = None if other is None else partial(open_model, other)
    return planned(model, registry.typed(target), Choices.parse(**grow.operators), second, grow.alpha)


def grow(
    recipe: Recipe,
    index: int,
    source: Path,
    folder: Path,
    target: Target,
    comm: Comm,
    *,
    other: Path | None,
    quiet: bool = False,
) -> Path:
    """`train.growing.Grow`: as `bert2bert grow`, on every rank of ``comm``. A finished growth of the same source and
    plan is taken as it is; what else lies in ``folder`` is deleted. quiet: print nothing."""
    make = partial(opened, recipe, index, source, other)
    if (done := on_first(comm, lambda: _finished(make(), folder))) is not None:
        return done
    lossy = any(phase.grow and phase.grow.lossy for phase in recipe.phases[index : index + 1])
    say = _silent if quiet or comm.rank else print
    return write_growth(make, folder, target, lossy=lossy, measure=False, comm=comm, say=say, bar=False)


def _silent(text: str) -> None:
    """Say nothing."""


def _finished(growth: Growth, folder: Path) -> Path | None:
    """The checkpoint in ``folder`` if it is this growth, complete; else what is there, of another timeline, goes."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.suffix != ".partial"]
    for place in (path for path in found if path.is_dir()):
        if (folder / "latest").exists() and _is(growth, place):
            return place
    if found:
        shutil.rmtree(folder)
    return None


def _is(growth: Growth, place: Path) -> bool:
    """Whether a folder holds this growth."""
    try:
        made = check_complete(place).growth
    except InvalidCheckpoint:
        return False
    if made is None or made.plan_digest != growth.plan.digest():
        return False
    return bool(made.source.get("sha256") == growth.model.source.identity()["sha256"])
