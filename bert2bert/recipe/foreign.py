"""Programs and triggers that a recipe file defines: what they must be, and the kind by which JSON names them.

A checkpoint records the kind and the fields, not the code: whoever goes on with the run gives the recipe file again.
Refused (`InvalidConfig`): what is no instance of a frozen dataclass with a kind of its own and the methods asked for.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from bert2bert.recipe.checks import require


def admit(
    what: str, value: Any, own: Collection[type], foreign: MutableMapping[str, type], methods: Collection[str]
) -> bool:
    """Let a setting have an instance of a class from a recipe file; whether it is such a one.

    what: the setting's name, such as "phase.program". own: this project's classes. foreign: those admitted before, by
    kind; of two with one kind the latter counts, for a file may be run again. methods: that the class must have.
    """
    cls = type(value)
    if cls in own:
        return False
    right = is_dataclass(value) and not isinstance(value, type) and cls.__dataclass_params__.frozen
    require(right, what, value, f"one of {', '.join(c.__name__ for c in own)}, or an instance of a frozen dataclass")
    kinds = [f.default for f in fields(value) if f.name == "kind" and not f.init]
    named = bool(kinds) and isinstance(kinds[0], str)
    require(named, f"{what} is {value!r}; its field kind", None, "kind: str = field(default=..., init=False)")
    taken = [c.__name__ for c in own for f in fields(c) if f.name == "kind" and f.default == kinds[0]]
    require(not taken, f"{what} is {value!r}; its kind", kinds[0], f"another kind than that of {''.join(taken)}")
    for method in methods:
        require(callable(getattr(value, method, None)), f"{what} is {value!r}; its {method}", None, "a method")
    foreign[str(kinds[0])] = cls
    return True
