"""Recipes: `from bert2bert.recipe import Recipe, Phase, …` is all that a recipe file needs. Imports no torch."""

from bert2bert.recipe.model_keys import model_keys
from bert2bert.recipe.recipe import (
    AdamW,
    Data,
    Full,
    Phase,
    Recipe,
    Schedule,
    SubModels,
    current,
    from_dict,
    load_recipe,
    renamed,
)

__all__ = [
    "AdamW",
    "Data",
    "Full",
    "Phase",
    "Recipe",
    "Schedule",
    "SubModels",
    "current",
    "from_dict",
    "load_recipe",
    "model_keys",
    "renamed",
]
