"""The growths of a recipe: checked before a run starts, and carried out between two phases or by `bert2bert grow`.

Refuses what `growth.plan` refuses, with the phase named, and the growth of a phase that has none.
"""

from __future__ import annotations

import shutil
from functools import partial
from math import prod
from pathlib import Path

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.checkpoints.commit.pending import check_complete
from bert2bert.checkpoints.target import Target
from bert2bert.commands.done import same_growth
from bert2bert.commands.grow import write_growth
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError, did_you_mean
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
    for i, phase in enumerate(recipe.phases):
        if phase.grow is None:
            continue
        try:
            plan, _ = growth_of(recipe, i)
        except UserError as error:
            raise InvalidConfig(f"phases.{i} ({phase.name!r}): its growth cannot be done: {error}") from None
        if plan.exactness.lossy and not phase.grow.lossy:
            raise InvalidConfig(
                f"phases.{i} ({phase.name!r}): this width cannot keep the function: {'; '.join(plan.exactness.lossy)}. "
                f"Choose a multiple, or accept the change with lossy=True in its Grow"
            )


def growth_of(recipe: Recipe, index: int) -> tuple[GrowthPlan, int]:
    """The plan of the growth before a phase, from the recipe alone, and how many parameters the model before it has.
    Raises InvalidConfig and UnsupportedGrowth."""
    grow = recipe.phases[index].grow
    if grow is None or recipe.model is None:
        raise ValueError(f"no growth before phase {index}, or no model")
    before = registry.typed(recipe.models[index - 1] if index else recipe.model)
    heads = _heads(before)
    plan = plan_growth(before, registry.typed(recipe.models[index]), Choices.parse(**grow.operators), heads=heads)
    return plan, sum(prod(p.shape) for p in table_for(before).parameters(before, heads).values())


def _heads(config: dict[str, object]) -> frozenset[str]:
    return table_for(config).names.classes[registry.class_of(config)]


def opened(
    recipe: Recipe,
    index: int,
    source: Path,
    other: Path | None = None,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
) -> Growth:
    """The growth of a checkpoint before a phase of a recipe. other: the checkpoint that it is mixed with.
    source_config, tag: as of `open_model`. Raises UserError of all kinds."""
    grow = recipe.phases[index].grow
    if grow is None:
        raise InvalidConfig(f"the recipe's phase {recipe.phases[index].name!r} begins without a growth")
    if grow.mix_with is not None and other is None:
        raise InvalidConfig(
            f"the growth before {recipe.phases[index].name!r} mixes in the last checkpoint of phase "
            f"{grow.mix_with!r}; name it with --with"
        )
    model = open_model(source, source_config, tag)
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
    say = _silent if quiet or comm.rank else print
    return write_growth(
        make, folder, target, lossy=lossy(recipe, index), measure=False, comm=comm, say=say, bar=False
    )  # fmt: skip


def lossy(recipe: Recipe, index: int) -> bool:
    """Whether the growth before a phase may miss its operator's promise."""
    grow = recipe.phases[index].grow
    return grow is not None and grow.lossy


def named(recipe: Recipe, phase: str | None) -> int:
    """Index of the phase whose growth is asked for; of the only one with a growth if none is named. Raises
    InvalidConfig."""
    grows = [p.name for p in recipe.phases if p.grow is not None]
    if phase is None and len(grows) == 1:
        phase = grows[0]
    if phase is None or phase not in grows:
        near = did_you_mean(phase or "", grows) if grows else "the recipe has no growth"
        raise InvalidConfig(f"--phase is {phase!r}; expected a phase that begins with a growth: {near}")
    return [p.name for p in recipe.phases].index(phase)


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
    """Whether a folder holds this growth, complete, in whatever layout."""
    try:
        return same_growth(growth, check_complete(place))
    except InvalidCheckpoint:
        return False
