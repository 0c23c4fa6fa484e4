"""The options of ``plan`` and ``grow`` by which a recipe says what grows. Imports no torch.

Refuses (`InvalidConfig`) a recipe beside options that it has in their place, and neither recipe nor config.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bert2bert.errors import InvalidConfig

if TYPE_CHECKING:
    from bert2bert.recipe import Recipe

OPERATORS = ("width", "depth", "vocab", "positions", "experts", "moments", "seed", "embeddings")
_OF_RECIPE = ("config", *OPERATORS, "break_symmetry", "alpha")
"""Options of a growth that a recipe has in their place."""


def asks_recipe(args: argparse.Namespace, parse: Callable[[Sequence[str]], argparse.Namespace]) -> bool:
    """Whether a recipe says what grows. parse: gives the defaults. Raises InvalidConfig unless
    exactly one of recipe and config does."""
    if args.recipe is None:
        if args.config is None or args.source is None:
            raise InvalidConfig("give SOURCE and --config FILE, the larger model, or --recipe FILE, whose model grows")
        if args.set or getattr(args, "phase", None) or getattr(args, "ds_config", None):
            raise InvalidConfig("--set, --phase and --ds_config belong to --recipe FILE; leave them out, or name it")
        return False
    plain = parse([args.command, *(["x", "y"] if "target" in args else [])])
    for key in _OF_RECIPE:
        if getattr(args, key) != getattr(plain, key):
            raise InvalidConfig(
                f"--{key.replace('_', '-')} is in the recipe, in the Grow of its phase; change it there, or with --set"
            )
    return True


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, with the model of SOURCE where it has none."""
    from bert2bert.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    if recipe.model is None:
        from bert2bert.train.model_of import model_of  # imports torch and DeepSpeed

        recipe = replace(recipe, model=model_of(args.source, recipe))
    return recipe
