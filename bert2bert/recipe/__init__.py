"""Recipes: `from bert2bert.recipe import Recipe, Phase, …` is all that a recipe file needs. Imports no torch."""

from bert2bert.data.objective import Causal, Masked, SpanCorruption
from bert2bert.model.program import Step
from bert2bert.recipe.growing import Grow
from bert2bert.recipe.load import from_dict, load_recipe
from bert2bert.recipe.model_keys import model_keys
from bert2bert.recipe.old_names import current, renamed
from bert2bert.recipe.programs import Draw, Fresh, Frozen, Full, Program, Shared, SubModels, Top, VirtualDepth
from bert2bert.recipe.recipe import (
    AdamW,
    Data,
    Phase,
    Recipe,
)
from bert2bert.recipe.safety import Safety
from bert2bert.recipe.schedules import Schedule
from bert2bert.recipe.triggers import Agreement, Epochs, Flops, Plateau, RunSteps, Stretch, Tokens, Trigger

__all__ = [
    "AdamW",
    "Agreement",
    "Causal",
    "Data",
    "Draw",
    "Epochs",
    "Flops",
    "Fresh",
    "Frozen",
    "Full",
    "Grow",
    "Masked",
    "Phase",
    "Plateau",
    "Program",
    "Recipe",
    "RunSteps",
    "Safety",
    "Schedule",
    "Shared",
    "SpanCorruption",
    "Step",
    "Stretch",
    "SubModels",
    "Tokens",
    "Top",
    "Trigger",
    "VirtualDepth",
    "current",
    "from_dict",
    "load_recipe",
    "model_keys",
    "renamed",
]
