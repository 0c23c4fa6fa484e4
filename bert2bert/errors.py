"""The errors a user can cause. Each names the thing, what was found, what was expected and the remedy.

Command-line entries catch `UserError`, print its text without a traceback and exit with status 2. Anything else that
escapes is a defect of this project.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Base of every error whose cause is the input; its text is shown as it is."""


class InvalidCheckpoint(UserError):
    """The checkpoint is missing, truncated, foreign, unsafe, or does not match its description."""


class InvalidConfig(UserError):
    """A recipe, a ds_config, a model config or a command-line option is contradictory or unknown."""


class InvalidData(UserError):
    """A text file, a tokenizer or a token bin cannot be used."""


class UnsupportedGrowth(UserError):
    """A valid request that the algebra cannot express; the text says what it can."""


class LossyGrowth(UserError):
    """The growth cannot keep the function and that was not acknowledged with --lossy."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing clause for an unknown name: the nearest known names, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "known: " + ", ".join(names)


def some(names: Sequence[object], most: int = 3) -> str:
    """The first few names of a list, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
