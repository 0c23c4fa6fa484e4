"""Recipes: `from bert2bert.recipe import Recipe, Phase, …` is all that a recipe file needs. Imports no torch."""

from bert2bert.data.objective import Causal, Masked, SpanCorruption
from bert2bert.recipe.model_keys import model_keys
from bert2bert.recipe.old_names import current, renamed
from bert2bert.recipe.recipe import (
    AdamW,
    Data,
    Full,
    Phase,
    Recipe,
    SubModels,
    from_dict,
    load_recipe,
)
from bert2bert.recipe.safety import Safety
from bert2bert.recipe.schedules import Schedule

__all__ = [
    "AdamW",
    "Causal",
    "Data",
    "Full",
    "Masked",
    "Phase",
    "Recipe",
    "Safety",
    "Schedule",
    "SpanCorruption",
    "SubModels",
    "current",
    "from_dict",
    "load_recipe",
    "model_keys",
    "renamed",
]
