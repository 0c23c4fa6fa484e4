"""The model of a checkpoint, for recipes that have none of their own. Refuses a checkpoint without a config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.open import open_source
from bert2bert.errors import InvalidConfig
from bert2bert.model import registry
from bert2bert.recipe import model_keys
from bert2bert.train.save import whole


def model_of(resume: Path | None) -> dict[str, Any]:
    """The config of the checkpoint that a run starts from, as far as it says what the model computes. Raises
    InvalidConfig where there is none."""
    if resume is None:
        raise InvalidConfig(
            "the recipe has no model (model=None takes that of a checkpoint), and there is no checkpoint to take it "
            "from; give one with --resume, or write the model's config into the recipe"
        )
    newest = whole(resume) if resume.is_dir() and not os.path.lexists(resume / "latest") else None
    config = open_source(newest or resume).config
    if config is None:
        raise InvalidConfig(
            f"{resume}: no config says which model this is, and the recipe has none either. Put the model's "
            "config.json into the folder"
        )
    known = model_keys(registry.typed(config))
    return {key: value for key, value in config.items() if key in known}
