"""The model of a checkpoint, for recipes that have none of their own. Refuses a checkpoint without a config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.manifest import Manifest, Trained
from bert2bert.checkpoints.open import open_source
from bert2bert.errors import InvalidConfig
from bert2bert.model import registry
from bert2bert.recipe import Recipe, model_keys
from bert2bert.train.position import grows_next, same_phases
from bert2bert.train.save import whole


def model_of(resume: Path | None, recipe: Recipe) -> dict[str, Any]:
    """The first model of a recipe that has none: the config of the checkpoint which the run starts from, as far as it
    says what the model computes; the one that the run itself began with, where it goes on. Raises InvalidConfig where
    there is none."""
    if resume is None:
        raise InvalidConfig(
            "the recipe has no model (model=None takes that of a checkpoint), and there is no checkpoint to take it "
            "from; give one with --resume, or write the model's config into the recipe"
        )
    newest = whole(resume) if resume.is_dir() and not os.path.lexists(resume / "latest") else None
    source = open_source(newest or resume)
    before = _run(source.manifest or Manifest(), recipe)
    if before is not None and before.recipe.get("model"):
        return dict(before.recipe["model"])  # it may have grown since
    if source.config is None:
        raise InvalidConfig(
            f"{resume}: no config says which model this is, and the recipe has none either. Put the model's "
            "config.json into the folder"
        )
    known = model_keys(registry.typed(source.config))
    return {key: value for key, value in source.config.items() if key in known}


def _run(manifest: Manifest, recipe: Recipe) -> Trained | None:
    """Where the run stood that goes on with a checkpoint, if one of this recipe does."""
    if manifest.training is not None:
        return manifest.training if same_phases(manifest.training, recipe) else None
    if manifest.growth is None or manifest.growth.source_training is None:
        return None
    before = Trained.from_json(manifest.growth.source_training)
    return before if grows_next(before, recipe) else None
