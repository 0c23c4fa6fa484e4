"""The growth between two phases of a run, carried out by the run's own ranks.

How a checkpoint grows is not known here: `Grow` is given by the launcher (`commands.phase_growth`), which is what
`bert2bert grow` does. Killed at any moment, the same call goes on: what a killed growth has finished is used again, and
a growth that was finished is taken as it is, if it is of the same source and plan.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bert2bert.checkpoints.manifest import Grown
from bert2bert.checkpoints.target import Target
from bert2bert.errors import InvalidConfig, UserError
from bert2bert.ranks.comm import Comm
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.recipe import Recipe
from bert2bert.train import ds_config
from bert2bert.train.engine import GROUP_LAYOUT
from bert2bert.train.job import Job
from bert2bert.train.position import Position
from bert2bert.train.save import tag_of

FOLDER = "growths"
"""In a run's folder: grown checkpoints from which the next phase has yet to save one of its own."""

LOST = 0.5
"""Nats above the loss of guessing among all tokens alike at which a growth that promises nothing counts as failed."""
GROWN_TOLERANCE = 0.05
"""Nats by which a held-out loss may rise at a growth that keeps the function: 16-bit arithmetic rounds otherwise in
another model."""


class Grow(Protocol):
    """Grow ``source`` into ``folder`` as the recipe says before phase ``index``; the folder of the grown checkpoint."""

    def __call__(
        self, recipe: Recipe, index: int, source: Path, folder: Path, target: Target, comm: Comm, *, other: Path | None
    ) -> Path: ...


def grown(
    recipe: Recipe, position: Position, grow: Grow | None, output: Path, source: Path | None, target: Target
) -> tuple[Path, float]:
    """(The grown checkpoint from which the phase at ``position`` starts, the seconds it took). Collective.

    source: the checkpoint of where the run stands. Raises InvalidConfig without it or a function that grows, what that
    function raises, and ValueError for a phase without a growth.
    """
    phase = recipe.phases[position.phase]
    if phase.grow is None:
        raise ValueError(f"no growth before phase {phase.name!r}")
    if grow is None:
        raise InvalidConfig(
            f"the model grows before phase {phase.name!r}, and this entrance has no operators; start the run with "
            "launch/pretrain.py"
        )
    if source is None:
        raise InvalidConfig(
            f"the recipe begins with the growth before phase {phase.name!r}, and {output} holds no checkpoint yet; "
            "give the one that grows with --resume, or with --resume auto --from"
        )
    other = None
    if phase.grow.mix_with is not None:
        at = [p.name for p in recipe.phases].index(phase.grow.mix_with)
        other = output / tag_of(position.ended[at])
    began = time.perf_counter()
    folder = output / FOLDER / phase_folder(position.phase)
    folder = grow(recipe, position.phase, source, folder, target, RANKS, other=other)
    return folder, time.perf_counter() - began


def check_loss(recipe: Recipe, index: int, growth: Grown, guessing: float, job: Job) -> None:
    """Raise UserError for a held-out loss that rose at the growth before a phase beyond what its plan says.

    index: of the phase; guessing: the loss of guessing among all tokens alike; job: knows the losses before and after.
    """
    phase, before, loss = recipe.phases[index], job.before, (job.result or {})["loss"]
    asked = recipe.safety.growth_loss_increase
    if phase.grow is not None and phase.grow.max_loss_increase is not None:
        asked = phase.grow.max_loss_increase
    exact = not growth.exactness.get("function")
    bound, why = max(guessing, before or 0.0) + LOST, f"that a model which knows nothing has and {LOST:g} more"
    allowed = GROWN_TOLERANCE if asked is None and exact else asked
    if before is not None and allowed is not None:
        bound, why = before + allowed, f"of {before:.4f} before the growth plus {allowed:g}"
    if not loss <= bound:
        raise UserError(
            f"the held-out loss after the growth before phase {phase.name!r} is {loss:.4f}, more than the "
            f"{bound:.4f} {why}: nothing was trained on it. Look at the growth (bert2bert plan --recipe), or allow "
            f"more with phases.{index}.grow.max_loss_increase. {job.newest()}"
        )


def phase_folder(index: int) -> str:
    """Name of the folder of the growth before a phase."""
    return f"phase{index}"


def drop(output: Path, position: Position) -> None:
    """Delete grown checkpoints of phases that have saved one of their own. On rank 0, the others wait."""

    def act() -> None:
        for index in range(position.phase + 1):
            folder = output / FOLDER / phase_folder(index)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
        if (output / FOLDER).is_dir() and not any((output / FOLDER).iterdir()):
            (output / FOLDER).rmdir()

    write_on_first(output, act)


def layout(settings: Mapping[str, Any]) -> Target:
    """The layout in which a growth is written: that of the engine which reads it. settings: its ds_config, resolved."""
    stage = ds_config.stage(settings)
    return Target(
        "zero", stage, RANKS.size, expert_parallel=ds_config.expert_ranks(settings) if stage in (1, 2) else None,
        precision=ds_config.precision(settings), groups=GROUP_LAYOUT,
    )  # fmt: skip
