"""What the schedules of a run need of the growth that its model comes from: factors to obey, parts to warm up again.

Refuses (`InvalidConfig`) a schedule that needs what no growth recorded.
"""

from __future__ import annotations

from collections.abc import Collection

from bert2bert.checkpoints.factors import Factors
from bert2bert.checkpoints.manifest import Grown
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Recipe


def factors_of(recipe: Recipe, index: int, growth: Grown | None, names: Collection[str]) -> dict[str, Factors] | None:
    """The factors of the model's parameters, if a phase of phase ``index``'s model obeys them: the optimizer's groups
    are the same in all of these, wherever a run is resumed.

    ``growth``: that of the checkpoint which the phase starts from. Parameters that have no factors are left out.
    """
    obey = False
    for i in _of_one_model(recipe, index):
        schedule, key = recipe.phases[i].schedule, f"phases.{i}.schedule"
        if schedule.follow == "source":
            obey = True
            if growth is None or growth.factors is None:
                raise InvalidConfig(
                    f"{key}.follow is 'source', and what the phase starts from has no factors of a growth to obey; "
                    f"start from a checkpoint that bert2bert grow wrote, or set {key}.follow=ignore"
                )
        rewarms = schedule.rewarm_steps > 0 or schedule.rewarm_peak != 1
        if schedule.rewarm == "fresh" and rewarms and not (growth and growth.inserted):
            raise InvalidConfig(
                f"{key}.rewarm is 'fresh', and what the phase starts from has no layers that a growth inserted; start "
                f"from a checkpoint that grew in depth, or set {key}.rewarm=all"
            )
    if not obey or growth is None or growth.factors is None:
        return None
    return {name: found for name in names if (found := growth.factors.of(name)) is not None}


def without_factors(growth: Grown | None, names: Collection[str]) -> str | None:
    """A sentence on the parameters that have no factors to obey, if there are any."""
    found = growth.factors.without if growth and growth.factors else {}
    left = [name for name in names if name in found]
    if not left:
        return None
    return (
        f"{len(left)} of {len(names)} parameters have no factors to obey ({left[0]}: {found[left[0]]}): the recipe's "
        "own rates hold for them, so the run follows its source's in the others alone"
    )


def _of_one_model(recipe: Recipe, index: int) -> range:
    """The phases from the growth before phase ``index``, or the run's start, to the next growth, that make steps."""
    grows = [i for i, phase in enumerate(recipe.phases) if phase.grow is not None]
    first = max((i for i in grows if i <= index), default=0)
    return range(first, min((i for i in grows if i > index), default=len(recipe.phases)))
