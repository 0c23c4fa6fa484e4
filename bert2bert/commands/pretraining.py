"""What ``launch/pretrain.py`` is given, checked before anything is started. Imports no torch.

Refuses (`InvalidConfig`) what recipe and ds_config refuse, each alone and together on so many ranks, and options that
do not go together.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Recipe, current, load_recipe
from bert2bert.train import ds_config


def checked(options: argparse.Namespace, world: int, says: bool) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with its overrides, and the ds_config as it was written. options: of ``launch/pretrain.py``; world:
    the number of ranks; says: whether this process prints notes."""
    overrides = [*options.set, *([f"data.bins={options.bins}"] if options.bins else [])]
    old = [text for text in overrides if current(text) != text]  # scripts that were written before go on
    if old and says:
        print(f"note: {', '.join(old)}: write {', '.join(map(current, old))}", file=sys.stderr, flush=True)
    recipe = load_recipe(options.recipe, [current(text) for text in overrides])
    if options.start is not None and options.resume != "auto":
        raise InvalidConfig(f"--from {options.start} belongs to --resume auto; give that, or --resume alone")
    config = ds_config.read(options.ds_config)
    if recipe.model is None:
        ds_config.resolve(config, recipe, world)
    for index in range(len(recipe.phases) if recipe.model is not None else 0):
        ds_config.of_phase(config, recipe, index, world)
    return recipe, config
