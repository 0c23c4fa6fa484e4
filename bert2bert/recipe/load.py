"""Recipes from files, with overrides, and from what a run recorded.

Refuses (`InvalidConfig`): a file that is no recipe or cannot be run, and overrides of what a recipe does not have.
Imports no torch.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.recipe.old_names import RENAMED, explain
from bert2bert.recipe.recipe import Recipe
from bert2bert.recipe.settings import assign, build


def from_dict(plain: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote. Raises InvalidConfig, naming the key by its dotted name."""
    recipe: Recipe = build(Recipe, plain, renamed=RENAMED)
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Run a recipe file, then apply ``key.sub.0=value`` overrides together; InvalidConfig says what is wrong where.

    ``size=NAME`` takes the recipe of that name which the file defines beside ``recipe``, such as one that runs in a
    minute, ``tiny = replace(recipe, …)``.
    """
    path = Path(path)
    name, overrides = "recipe", list(overrides)
    for text in [text for text in overrides if text.partition("=")[0] == "size"]:
        overrides.remove(text)
        name = text.partition("=")[2]
    if not path.is_file():
        raise InvalidConfig(f"no recipe {path}: expected a Python file that defines `recipe = Recipe(...)`")
    try:
        defined = runpy.run_path(str(path))
    except InvalidConfig as error:
        raise InvalidConfig(f"recipe {path}: {error}") from error
    except Exception as error:  # the file is the user's code: any failure in it is his to read
        if old := explain(error):
            raise InvalidConfig(f"recipe {path}: {old}") from None
        raise InvalidConfig(f"recipe {path} cannot be run: {type(error).__name__}: {error}") from error
    found = defined.get(name)
    if name != "recipe" and not isinstance(found, Recipe):
        sizes = [n for n, value in defined.items() if isinstance(value, Recipe) and n != "recipe" and n.islower()]
        raise InvalidConfig(
            f"recipe {path} defines no recipe of size {name!r}; "
            + (did_you_mean(name, sizes) if sizes else "leave size= out")
        )
    if not isinstance(found, Recipe):
        raise InvalidConfig(f"recipe {path} defines no `recipe = Recipe(...)` (found {type(found).__name__})")
    if not overrides:
        return found
    plain = found.to_dict()
    for text in overrides:
        assign(Recipe, plain, text, RENAMED)
    return from_dict(plain)
